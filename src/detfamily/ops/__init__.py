"""The multi-scale deformable attention op."""

from detfamily.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_projected

__all__ = ["ms_deform_attn", "ms_deform_attn_projected"]
