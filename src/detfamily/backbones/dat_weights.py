"""Weights of DAT and DAT++, from the files of their authors (LeapLabTHU/DAT, LeapLabTHU/DAT-Detection)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detfamily.backbones.weights import fill, naming, read_state

if TYPE_CHECKING:
    from detfamily.backbones.dat import DAT

_CLOUD = "https://cloud.tsinghua.edu.cn/f"
PAGES = {
    "dat_tiny_in1k_224": f"{_CLOUD}/1367349deefc48efa650/",
    "dat_small_in1k_224": f"{_CLOUD}/f04b18081e3e4606adb7/",
    "dat_base_in1k_224": f"{_CLOUD}/a8d2a9645d454120b635/",
    "dat_base_in1k_384": f"{_CLOUD}/cf6a6b543cd64e0d8e43/",
    "dat_pp_tiny_in1k_224": f"{_CLOUD}/14c5ddae10b642e68089/",
    "dat_pp_small_in1k_224": f"{_CLOUD}/4c2a76360c964fbd81d5/",
    "dat_pp_base_in1k_224": f"{_CLOUD}/8e30492404d348d89f25/",
    "dat_pp_base_in1k_384": f"{_CLOUD}/032dc804cdf44bf18bb5/",
}
"""Name -> the page in the authors' tables from which the file is downloaded by hand. Two of the names stand in their
instructions, dat_tiny_in1k_224 and dat_pp_tiny_in1k_224; the others are made like them."""


def load_weights(dat: DAT, weights: str) -> None:
    """Fill a DAT; the norms of its outputs, which no classifier has, stay as they are then.

    Args:
        dat: whose last stage may be any; what the file has beyond it is left out.
        weights: the path of a file with official names: of a classifier, with tensors under "model" or by themselves,
            or of a detector of mmdetection, under "state_dict". Tables of position biases of another size are
            interpolated. Or an official name, for which the error tells where the file is.

    Raises:
        CheckpointError: the file cannot be read, or is of another network.
    """
    # here, because adapters know detectors, which know backbones
    from detfamily.checkpoints.dat import PREFIX, dat_adapter, tables

    with naming(weights):
        state = read_state(weights, {}, PAGES)
        if any(name.startswith(PREFIX) for name in state):  # of a detector, whose other parts nobody wants
            state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        detection = any(name.endswith(".gamma") for name in state)
        fill(dat, state, dat_adapter(dat, detection=detection), tables(dat), weights)
