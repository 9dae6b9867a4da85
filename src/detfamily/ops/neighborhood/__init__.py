"""Neighborhood attention: every token of a map sees a window around it; three ways to compute it."""

from detfamily.ops.neighborhood.interface import Backend, neighborhood_attn

__all__ = ["Backend", "neighborhood_attn"]
