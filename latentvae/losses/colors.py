"""Images of any channels as RGB, for networks that know RGB alone: LPIPS, every discriminator, the
eye.

One channel is repeated. Of four, the last is alpha (-1 transparent, 1 opaque), and colours lie over
a background. In training that is a random colour for each image, the same under an image and its
reconstruction, so that neither a colour where nothing shows nor one certain background can be
learned; elsewhere it is mid-grey.

`B` batch, `C` channels (1, 3 or 4), `H W` pixels. Images and backgrounds are in [-1, 1].
"""

import torch
from torch import Tensor

MID_GREY = 0.0


def to_rgb(images: Tensor, background: Tensor | float = MID_GREY) -> Tensor:
    """(B, C, H, W) to (B, 3, H, W), with the gradient; RGB is given back as it is.

    Args:
        background: what lies under images with alpha: a grey, or colours that broadcast to
            (B, 3, H, W).
    """
    channels = images.shape[1]
    if channels == 3:
        return images
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels != 4:
        raise ValueError(f"images have 1, 3 or 4 channels, not {channels}")
    colour, alpha = images[:, :3], (images[:, 3:] + 1) / 2
    return background + alpha * (colour - background)


def random_background(images: Tensor) -> Tensor | float:
    """A colour (B, 3, 1, 1) for each of images with alpha, uniform in [-1, 1], from the global
    generator, which the training loop seeds per micro-step; nothing is drawn for others."""
    if images.shape[1] != 4:
        return MID_GREY
    return 2 * torch.rand(len(images), 3, 1, 1, dtype=images.dtype, device=images.device) - 1
