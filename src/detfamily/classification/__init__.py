"""Classification of whole images, ImageNet-style: any backbone with a linear head, trained by the engine's loop."""
