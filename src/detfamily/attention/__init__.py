"""Attention over tokens, one file per kind.

Every attention is called as ``attention(query: Tokens, source: Tokens, attention_mask=None) -> (B, N, C)``: for each
token of ``query``, what it reads from ``source``. In an encoder both are the tokens of the feature maps, in a decoder's
self-attention both are the object queries, in its cross-attention the queries read from the maps.
"""

from detfamily.attention.dense import DenseAttention
from detfamily.attention.ms_deform import MSDeformAttention, OwnLevelDeformAttention

__all__ = ["DenseAttention", "MSDeformAttention", "OwnLevelDeformAttention"]
