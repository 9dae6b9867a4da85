"""Proof against the official code: golden cases, computed by the official implementations, against ours."""
