"""Encoder and decoder of ViT autoencoders: patches of pixels and a transformer.

images (B, C, H, W) -> one token for each patch -> transformer -> maps (B, c, h, w)
maps (B, c, h, w) -> transformer -> head -> images (B, C, p h, p w)

The first and the last layer have diffusers' names `conv_in` and `conv_out`.

`B` batch, `C` image channels, `c` channels of a token, `p` patch size, `h w` grid of tokens.
"""

from typing import Literal

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.errors import UserError
from latentvae.models.vit.transformer import Transformer

Head = Literal["linear", "conv"]
HEAD_CHANNELS = 32  # number of maps at full resolution in the output layers `ConvHead`


class ViTEncoder(nn.Module):
    """Encode patches of images to maps (B, c, H/p, W/p).

    Args:
        image_channels: number of image channels.
        channels: number of channels c of a token.
        patch_size: side p of a patch in pixels.
        num_blocks, head_channels: number of transformer blocks, and channels of an attention head.
    """

    def __init__(
        self,
        image_channels: int,
        channels: int,
        *,
        patch_size: int,
        num_blocks: int,
        head_channels: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(image_channels, channels, patch_size, stride=patch_size)
        self.transformer = Transformer(channels, num_blocks=num_blocks, head_channels=head_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) to maps (B, c, H/p, W/p), for patch size p.

        Raises:
            UserError: H or W is not a multiple of the patch size.
        """
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"The sides of images must be multiples of patch_size {self.patch_size} (got "
                f"{height} x {width} pixels)."
            )
        return self.transformer(self.conv_in(images))


class ViTDecoder(nn.Module):
    """Decode maps (B, c, h, w) to images (B, C, p h, p w).

    Args:
        image_channels: number of image channels C.
        channels: number of channels c of a token.
        patch_size: side p of a patch in pixels.
        num_blocks, head_channels: number of transformer blocks, and channels of an attention head.
        head: the last layers. `"linear"` computes the pixels of each patch from its token alone.
            `"conv"` has two convolutions at full resolution, which also read neighbouring patches.
    """

    def __init__(
        self,
        image_channels: int,
        channels: int,
        *,
        patch_size: int,
        num_blocks: int,
        head_channels: int,
        head: Head,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.transformer = Transformer(channels, num_blocks=num_blocks, head_channels=head_channels)
        if head == "linear":
            self.head = None
            self.conv_out = nn.Conv2d(channels, image_channels * patch_size**2, 1)
        else:
            self.head = ConvHead(channels, patch_size=patch_size)
            self.conv_out = nn.Conv2d(HEAD_CHANNELS, image_channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.transformer(maps)
        if self.head is not None:
            return self.conv_out(self.head(tokens))
        return to_pixels(self.conv_out(tokens), patch_size=self.patch_size)


class ConvHead(nn.Module):
    """Turn tokens (B, c, h, w) into maps at full resolution, and convolve them across patches."""

    def __init__(self, channels: int, *, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.expand = nn.Conv2d(channels, HEAD_CHANNELS * patch_size**2, 1)
        self.conv = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return maps (B, HEAD_CHANNELS, p h, p w) at full resolution, for patch size p."""
        return F.silu(self.conv(to_pixels(self.expand(tokens), patch_size=self.patch_size)))


def to_pixels(tokens: Tensor, *, patch_size: int) -> Tensor:
    """Turn the C p p numbers of each token, (B, C p p, h, w), into a patch of p x p pixels.

    The result is (B, C, p h, p w).
    """
    return rearrange(tokens, "B (C p q) h w -> B C (h p) (w q)", p=patch_size, q=patch_size)
