"""Attention over tokens, one file per kind.

Every attention is called as ``attention(query: Tokens, source: Tokens, attention_mask=None) -> (B, N, C)``: for each
token of ``query``, what it reads from ``source``. In an encoder both are the tokens of the feature maps, in a decoder's
self-attention both are the object queries, in its cross-attention the queries read from the maps.

A ``MapAttention`` needs to know which tokens are neighbours, so it is for the tokens of feature maps alone; backbones
call its ``on_map``, (B, h, w, C) -> (B, h, w, C).

A cross-attention with ``reads_sine = True`` compares the queries' ``sine`` code; ``needs_reference_points = True`` says
that it samples around their references.
"""

from detfamily.attention.axial import AxialAttention
from detfamily.attention.conditional import (
    ConditionalAttention,
    LevelConditionalAttention,
    RescaledSine,
    SplitDenseAttention,
)
from detfamily.attention.deformable import DeformableAttention, DeformableAttention2022, PooledAttention
from detfamily.attention.dense import DenseAttention
from detfamily.attention.maps import MapAttention
from detfamily.attention.ms_deform import MSDeformAttention, OwnLevelDeformAttention
from detfamily.attention.neighborhood import NeighborhoodAttention
from detfamily.attention.pyramid import PyramidAttention
from detfamily.attention.qna import LearnedQueryAttention, LinearQueryAttention, SigmoidQueryAttention
from detfamily.attention.slide import SlideAttention
from detfamily.attention.window import WindowAttention

__all__ = [
    "AxialAttention",
    "ConditionalAttention",
    "DeformableAttention",
    "DeformableAttention2022",
    "DenseAttention",
    "LearnedQueryAttention",
    "LevelConditionalAttention",
    "LinearQueryAttention",
    "MSDeformAttention",
    "MapAttention",
    "NeighborhoodAttention",
    "OwnLevelDeformAttention",
    "PooledAttention",
    "PyramidAttention",
    "RescaledSine",
    "SigmoidQueryAttention",
    "SlideAttention",
    "SplitDenseAttention",
    "WindowAttention",
]
