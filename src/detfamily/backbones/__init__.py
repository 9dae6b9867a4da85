"""Backbones: (B, 3, H, W) normalised pixels -> maps, finest first.

Stage k is the field's C_k, the map with 1 / 2^k of the image's side (C5 with 1/16 where it is dilated). ``channels``
lists the channels of the maps that are given.
"""
