"""The blocks between a backbone and a criterion: each file holds one idea."""
