"""ImageNet weights of Swin Transformers, from the files of their authors (microsoft/Swin-Transformer)."""

from __future__ import annotations

from torch import nn

from detfamily.backbones.weights import fill, naming, read_state

_RELEASES = "https://github.com/SwinTransformer/storage/releases/download"
_BASE, _LARGE = "swin_base_patch4", "swin_large_patch4"
_FILES = {
    "v1.0.0": (
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        *(f"{_BASE}_window7_224", f"{_BASE}_window7_224_22k", f"{_BASE}_window7_224_22kto1k"),
        *(f"{_BASE}_window12_384", f"{_BASE}_window12_384_22k", f"{_BASE}_window12_384_22kto1k"),
        *(f"{_LARGE}_window7_224_22k", f"{_LARGE}_window7_224_22kto1k"),
        *(f"{_LARGE}_window12_384_22k", f"{_LARGE}_window12_384_22kto1k"),
    ),
    "v1.0.8": (
        *("swin_tiny_patch4_window7_224_22k", "swin_tiny_patch4_window7_224_22kto1k_finetune"),
        *("swin_small_patch4_window7_224_22k", "swin_small_patch4_window7_224_22kto1k_finetune"),
    ),
}
URLS = {name: f"{_RELEASES}/{release}/{name}.pth" for release, names in _FILES.items() for name in names}
"""Official name -> where the file lies; 384 is the image's side, 22k and 1k the number of classes."""


def load_weights(swin: nn.Module, weights: str) -> None:
    """Fill a Swin; the norms of its outputs, which no classifier has, stay as they are.

    Args:
        swin: whose last stage may be any; what the file has beyond it is left out.
        weights: an official name, or the path of a file with official names, as a state dict or as its "model". Biases
            for windows of another size are interpolated.

    Raises:
        CheckpointError: the file cannot be downloaded or read, or is of another network.
    """
    # here, because adapters know detectors, which know backbones
    from detfamily.checkpoints.adapter import Adapter
    from detfamily.checkpoints.swin import CLASSIFIER, rules

    tables = [name for name in swin.state_dict() if name.endswith(".position_bias")]
    with naming(weights):
        fill(swin, read_state(weights, URLS), Adapter(rules("", ""), CLASSIFIER), tables, weights)
