"""Which blocks go together, and what each combination costs: families x attentions x backbones, a step of each."""
