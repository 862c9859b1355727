"""Convert images to RGB, for LPIPS, the feature loss, the discriminators and display.

A grey channel is repeated three times. In images with four channels, the last channel is alpha (-1
transparent, 1 opaque), and the colours are blended with a background. In training, the background
is a random colour for each image, so that the model does not rely on a fixed background. An image
and its reconstruction have the same background, so LPIPS and the discriminators ignore the colours
of transparent pixels. In distillation and outside training, the background is mid-grey.

`B` batch, `C` channels (1, 3 or 4), `H W` pixels. Images and backgrounds are in [-1, 1].
"""

import torch
from torch import Tensor

MID_GREY = 0.0


def to_rgb(images: Tensor, background: Tensor | float = MID_GREY) -> Tensor:
    """Return images (B, C, H, W) as RGB (B, 3, H, W). Gradients pass through.

    RGB images are not changed.

    Args:
        background: colour behind transparent pixels: one grey value, or colours that broadcast to
            the shape (B, 3, H, W).
    """
    channels = images.shape[1]
    if channels == 3:
        return images
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels != 4:
        raise ValueError(f"Images must have 1, 3 or 4 channels (got {channels}).")
    colour, alpha = images[:, :3], (images[:, 3:] + 1) / 2
    return background + alpha * (colour - background)


def random_background(images: Tensor) -> Tensor | float:
    """Return a colour (B, 3, 1, 1) for each image with alpha, uniform in [-1, 1].

    The colour is drawn with torch's global generator, which the training loop seeds for each
    micro-step (forward and backward pass). For images without alpha the colour is mid-grey, and no
    random number is drawn.
    """
    if images.shape[1] != 4:
        return MID_GREY
    return 2 * torch.rand(len(images), 3, 1, 1, dtype=images.dtype, device=images.device) - 1
