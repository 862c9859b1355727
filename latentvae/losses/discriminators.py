"""Critics on image patches."""

import torch
from torch import Tensor, nn


class PatchGAN(nn.Module):
    """PatchGAN critic (Isola et al. 2017, arXiv:1611.07004): one logit per overlapping image patch.

    Differs from the pix2pix original in one thing: GroupNorm in place of BatchNorm. With batch
    statistics the logits of real images depend on the fakes beside them and on the number of ranks,
    and each forward pass of the generator's part would move the critic's running averages.

    Args:
        in_channels: image channels.
        channels: width of the first layer; doubled per layer up to eight times.
        num_layers: stride-2 layers; 3 gives a receptive field of 70 pixels.
        norm_groups: groups of each GroupNorm.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 64,
        num_layers: int = 3,
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for i in range(1, num_layers + 1):
            previous, width = width, channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(norm_groups, width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w), positive for real; images (B, C, H, W) in [-1, 1]."""
        return self.layers(images)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) weights, as pix2pix."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
