"""Discriminators of image patches and of whole images.

The discriminator of patches follows Isola et al. 2017, arXiv:1611.07004. The discriminator of whole
images follows Karras et al. 2020, arXiv:1912.04958.

No discriminator in this module has batch norm. With batch norm, the logits of real images would
depend on the reconstructions in the batch and on the number of ranks. Also, the model's training
step would change the running averages of the discriminator's batch norm.

`B` batch, `C` image channels, `H W` image size, `h w` size of the map of logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import ParametrizationList

from latentvae.errors import UserError, nearest

PATCH_NORMS = ("group", "spectral", "none")
_PATCH_LAYERS = 3  # one logit per patch of 70 x 70 pixels
_STYLEGAN_LAST_SIDE = 4  # side of the last feature map in Karras et al.


def power_iteration(discriminator: nn.Module) -> None:
    """Take one step of the power iteration of each spectral norm in ``discriminator``.

    A spectral norm estimates the largest singular value of a weight by power iteration. Call this
    function once per update, after the optimiser's step. The result depends only on the weights, so
    ranks with equal weights get equal results without communication.
    """
    with torch.no_grad():
        for module in discriminator.modules():
            if isinstance(module, ParametrizationList):
                module.train()
                module()
                module.eval()


class PatchGAN(nn.Module):
    """A discriminator with one logit per overlapping image patch.

    The only difference from the discriminator of pix2pix is the norm, which is not BatchNorm.

    The network is always in eval mode, and `.train()` has no effect. In train mode, torch's
    spectral norm would take a step of its power iteration in every forward pass, so the weights
    would differ between the forward passes of one update. Therefore the function `power_iteration`
    takes one step of the power iteration per update.

    Args:
        in_channels: number of image channels.
        channels: number of channels of the first layer. This number doubles with each layer, up to
            8 times the first number.
        num_layers: number of layers with stride 2. With 3 layers, the receptive field of a
            logit is 70 x 70 pixels.
        norm: "group", "spectral" or "none". With "spectral" every convolution's weight is divided
            by its largest singular value (Miyato et al. 2018, arXiv:1802.05957).
        norm_groups: number of groups of each GroupNorm.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 64,
        num_layers: int = _PATCH_LAYERS,
        norm: str = "group",
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        if norm not in PATCH_NORMS:
            allowed, hint = ", ".join(PATCH_NORMS), nearest(norm, PATCH_NORMS)
            raise UserError(f"The norm must be one of {allowed} (got '{norm}'){hint}")

        # layers
        conv = _SpectralConv2d if norm == "spectral" else nn.Conv2d
        group = norm == "group"
        layers: list[nn.Module] = [
            conv(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for i in range(1, num_layers + 1):
            previous, width = width, channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                conv(previous, width, 4, stride=stride, padding=1, bias=not group),
                *([nn.GroupNorm(norm_groups, width)] if group else []),
                nn.LeakyReLU(0.2),
            ]
        layers.append(conv(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

        # Set the weights before spectral norms are added, because a spectral norm replaces them.
        self.apply(_initialise)
        for layer in self.layers:
            if isinstance(layer, _SpectralConv2d):
                spectral_norm(layer)
        self.train()

    def train(self, mode: bool = True) -> "PatchGAN":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return a map of logits (B, 1, h, w) of images in [-1, 1]. Positive means real."""
        return self.layers(images)


class _SpectralConv2d(nn.Conv2d):
    """A convolution that computes its spectral norm in float32.

    Under autocast on a GPU, torch's spectral norm would multiply a bfloat16 vector by a float32
    vector, which is an error.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(input, weight, self.bias)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 0.02^2), and set its bias to 0, as pix2pix does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class StyleGANDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator: one logit per image, for images of any size.

    The source is arXiv:1912.04958, section 3 and appendix B.

    images -> 1x1 conv -> residual blocks that each halve the map -> 3x3 conv -> mean over space ->
    two dense layers -> logit

    Two things differ from StyleGAN2:

    - StyleGAN2 flattens a 4 x 4 map. This class takes a mean over space, which allows images of any
      size.
    - StyleGAN2 has a layer with the standard deviation over the minibatch. This class leaves that
      layer out, because an image's logit would depend on the other images of the batch, and thus
      on ranks and micro-steps. In StyleGAN2, that layer prevents mode collapse of the generator,
      which cannot happen with reconstructions.

    Weights start as N(0, 1) and are scaled in each forward pass (equalised learning rate). So the
    learning rate should be 2e-3 as in the paper, not 1e-4 as for a PatchGAN.

    Args:
        in_channels: number of image channels.
        channels: number of channels at full resolution. This number doubles with each block, up to
            8 times the first number.
        num_layers: number of residual blocks. Each side of an image needs at least 2 ** num_layers
            pixels.
    """

    def __init__(self, *, in_channels: int = 3, channels: int = 64, num_layers: int = 6) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        last = widths[-1]
        self.layers = nn.Sequential(
            _EqualisedConv2d(in_channels, channels, 1),
            _ScaledLeakyReLU(),
            *(_ResidualDown(*pair) for pair in pairwise(widths)),
            _EqualisedConv2d(last, last, 3, padding=1),
            _ScaledLeakyReLU(),
            nn.AdaptiveAvgPool2d(1),
            _EqualisedConv2d(last, last, 1),
            _ScaledLeakyReLU(),
            _EqualisedConv2d(last, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit, (B, 1, 1, 1), for each image in [-1, 1]. Positive means real."""
        return self.layers(images)


class _EqualisedConv2d(nn.Conv2d):
    """A convolution with initial weights N(0, 1), divided by sqrt(fan-in) in each forward pass.

    The source is Karras et al. 2018, arXiv:1710.10196, section 4.1.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        scale = 1.0 / math.sqrt(self.weight[0].numel())
        return self._conv_forward(input, self.weight * scale, self.bias)


class _ScaledLeakyReLU(nn.LeakyReLU):
    """A leaky ReLU times sqrt(2), which approximately preserves the variance."""

    def __init__(self) -> None:
        super().__init__(0.2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.sqrt(2.0)


class _Blur(nn.Module):
    """The filter [1, 3, 3, 1], which prevents aliasing when the map is halved."""

    def __init__(self, *, stride: int, padding: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        width = images.shape[1]
        kernel = self.get_buffer("kernel").to(images.dtype).expand(width, 1, 4, 4)
        return F.conv2d(images, kernel, stride=self.stride, padding=self.padding, groups=width)


class _ResidualDown(nn.Module):
    """A residual block that halves height and width: (B, in, H, W) -> (B, out, H // 2, W // 2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _EqualisedConv2d(in_channels, in_channels, 3, padding=1),
            _ScaledLeakyReLU(),
            _Blur(stride=1, padding=2),
            _EqualisedConv2d(in_channels, out_channels, 3, stride=2),
            _ScaledLeakyReLU(),
        )
        self.skip = nn.Sequential(
            _Blur(stride=2, padding=1), _EqualisedConv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.skip(x)) * math.sqrt(0.5)


Discriminator = PatchGAN | StyleGANDiscriminator


@dataclass(frozen=True)
class DiscriminatorKind:
    """The class of a kind of discriminator, with the options and image sizes that it allows.

    Attributes:
        build: the discriminator's class, called with `in_channels`, `channels`, `num_layers`, and
            with `norm` if there is a choice of norms.
        norms: allowed values of `norm`, the default first, or empty if there is no choice of norms.
        default_layers: function that takes the shorter side of the images in pixels, and returns
            the default number of layers that halve the map.
        smallest_side: function that takes the number of layers, or None for the default, and
            returns the smallest side of an image, in pixels, for which there is a logit.
    """

    build: Callable[..., Discriminator]
    norms: tuple[str, ...]
    default_layers: Callable[[int], int]
    smallest_side: Callable[[int | None], int]


# A new discriminator needs a class, a line here, and its name in `DiscriminatorConfig.disc_type`.
DISCRIMINATORS: dict[str, DiscriminatorKind] = {
    "patch": DiscriminatorKind(
        PatchGAN,
        norms=PATCH_NORMS,
        default_layers=lambda side: _PATCH_LAYERS,
        smallest_side=lambda num_layers: 3 * 2 ** (num_layers or _PATCH_LAYERS),
    ),
    "stylegan": DiscriminatorKind(
        StyleGANDiscriminator,
        norms=(),
        default_layers=lambda side: int(math.log2(side / _STYLEGAN_LAST_SIDE)),
        smallest_side=lambda num_layers: (
            2 * _STYLEGAN_LAST_SIDE if num_layers is None else 2**num_layers
        ),
    ),
}


def build_discriminator(
    kind: str,
    *,
    image_size: tuple[int, int],
    in_channels: int = 3,
    channels: int = 64,
    num_layers: int | None = None,
    norm: str | None = None,
) -> Discriminator:
    """Return a freshly initialised discriminator.

    Args:
        kind: a key of `DISCRIMINATORS`.
        image_size: height and width of the smallest images in training, in pixels.
        in_channels: number of image channels.
        channels: number of channels of the first layer. This number doubles with each layer, up to
            8 times the first number.
        num_layers: number of layers or blocks that halve the map. The default for "patch" is 3,
            which gives patches of 70 x 70 pixels. The default for "stylegan" is the largest number
            that leaves a map of at least 4 positions on the shorter side.
        norm: "group" (the default), "spectral" or "none". Only the kind "patch" has a choice of
            norms.

    Raises:
        UserError: the kind is unknown, the kind has no such norm, or the images are too small.
    """
    # options
    if kind not in DISCRIMINATORS:
        allowed, hint = ", ".join(DISCRIMINATORS), nearest(kind, DISCRIMINATORS)
        raise UserError(f"The discriminator must be one of {allowed} (got '{kind}'){hint}")
    entry, side = DISCRIMINATORS[kind], min(image_size)
    if side < (least := smallest_side(kind, num_layers)):
        raise UserError(
            f"Images for this discriminator must have at least {least} px on the shorter side "
            f"(got {side} px)."
        )
    if not entry.norms and norm not in (None, "none"):
        raise UserError(
            f"The {kind} discriminator has no norm '{norm}'. Leave the norm out, or use 'none'."
        )

    # network
    return entry.build(
        in_channels=in_channels,
        channels=channels,
        num_layers=num_layers or entry.default_layers(side),
        **({"norm": norm or entry.norms[0]} if entry.norms else {}),
    )


def smallest_side(kind: str, num_layers: int | None = None) -> int:
    """Return the smallest side of an image, in pixels, for which a discriminator gives a logit.

    Args:
        kind: a key of `DISCRIMINATORS`.
        num_layers: number of layers that halve the map, or None for the default.
    """
    return DISCRIMINATORS[kind].smallest_side(num_layers)
