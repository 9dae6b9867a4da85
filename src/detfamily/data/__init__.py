"""Data sets in the COCO format, their augmentation, and the loaders that batch them."""
