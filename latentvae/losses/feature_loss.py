"""The distance of images and reconstructions in the features of a network such as DINOv2.

ViTok-v2 (arXiv:2605.05331) trains with a feature loss, and with neither LPIPS nor a discriminator.
The package `dino-perceptual` of ViTok-v2's authors takes the hidden states of every block, scales
the vector at each position to unit length, and averages the squared differences over blocks,
positions and channels. This module takes half the sum over channels, not the mean over channels. So
the loss of this module is the mean of 1 - cosine similarity, which is C / 2 times the loss of
`dino-perceptual`. A good weight for this feature loss does not depend on the number of channels C
of the network.

`B` batch, `C` channels of a layer, `S` positions of a layer, `H W` image size.
"""

import contextlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.errors import UserError, first_line
from latentvae.losses.colors import to_rgb
from latentvae.losses.perceptual import unit_features, weights_id

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PROCESSOR = "preprocessor_config.json"


class FeatureLoss(nn.Module):
    """The distance of each image from its reconstruction, in the features of a frozen network.

    Only the reconstruction gets a gradient. The network runs under the caller's autocast. The
    distances are computed in float32. The module is always in eval mode, and `.train()` has no
    effect.

        loss = load_feature_loss("path/to/dinov2-small")
        distance = loss(images, recon)  # (B,), from 0 to 2

    Args:
        network: network of the library `transformers` that takes images and returns hidden states.
        mean, std: mean and standard deviation of the three colours, for pixels in [0, 1]. The
            network's training images were normalised with these values.

    Attributes:
        num_layers: number of layers that are compared, or 0 before the first call.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Any,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.patch = _patch_size(network.config)
        self.num_layers = 0
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "FeatureLoss":
        return super().train(False)

    @property
    def weights_id(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of weights, mean and std."""
        return weights_id(self)

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        """Return the distance of each image from its reconstruction, (B,), float32, from 0 to 2.

        Args:
            images, recon: (B, C, H, W) in [-1, 1]. Grey images (C = 1) are repeated to three
                channels, and RGBA images are blended with mid-grey (`colors.to_rgb`).
        """
        with torch.no_grad():
            targets = self.features(images)
        pairs = zip(targets, self.features(recon), strict=True)
        with torch.autocast(device_type=images.device.type, enabled=False):
            return torch.stack([_distance(*pair) for pair in pairs]).mean(dim=0)

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Return the hidden states of all layers except the embedding.

        Each hidden state has C channels at S positions, (B, C, S).
        """
        pixels = (0.5 * to_rgb(images) + 0.5 - self.mean) / self.std
        states = self.network(
            pixel_values=self._fitting(pixels), output_hidden_states=True, **self._options()
        ).hidden_states[1:]
        self.num_layers = len(states)
        return [x.flatten(2) if x.ndim == 4 else x.transpose(1, 2) for x in states]

    def _fitting(self, pixels: Tensor) -> Tensor:
        """Return images whose sides are multiples of the patch size, resized if necessary."""
        size = [max(round(side / self.patch), 1) * self.patch for side in pixels.shape[2:]]
        if size == list(pixels.shape[2:]):
            return pixels
        return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)

    def _options(self) -> dict[str, bool]:
        """Return the argument that some networks need for image sizes that differ from training.

        The result is empty for networks without this argument.
        """
        names = inspect.signature(self.network.forward).parameters
        return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}


def load_feature_loss(path: str, *, sizes: Sequence[tuple[int, int]] = ()) -> FeatureLoss:
    """Return the loss with a network of the library `transformers` from a folder or the Hub.

    The network is in float32, on the CPU, and frozen. If weights are missing, an error is raised.
    Only the weights of a pooler may be missing, because the loss does not depend on them.

    Args:
        path: the folder, or the name of a repository on the Hugging Face Hub.
        sizes: image sizes (height, width) that the network must take. If empty, the network must
            take 64 x 64 pixels.

    Raises:
        UserError: `transformers` is not installed, there is no such network, the network does not
            take RGB images, its weights are missing, or it does not return features of images of
            these sizes.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UserError(
            f"feature_loss '{path}' needs the package transformers (pip install transformers)."
        ) from error
    if not Path(path).is_dir() and (path.count("/") != 1 or path[0] in "./~"):
        raise UserError(f"feature_loss '{path}' is neither a folder nor the name of a Hub model.")

    # network and weights
    here = {"local_files_only": Path(path).is_dir()}
    try:
        with _without_report():
            network, found = AutoModel.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **here
            )
        mean, std = _colours(path, **here)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"feature_loss '{path}' is not a network that transformers can load: "
            f"{first_line(error)}"
        ) from error
    _check_network(network, path, missing=found["missing_keys"])

    # a first call
    loss = FeatureLoss(network.float(), mean=mean, std=std)
    for height, width in sizes or [(64, 64)]:
        _check_size(loss, path, height, width)
    return loss


def _check_network(network: Any, path: str, *, missing: Sequence[str]) -> None:
    """Raise UserError unless the network takes RGB images and has all its weights.

    Only the weights of a pooler may be missing.
    """
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise UserError(
            f"feature_loss '{path}' is a {type(network).__name__}, which does not take images "
            "alone. Give an image network, such as DINOv2 or ConvNeXt."
        )
    if (channels := getattr(network.config, "num_channels", 3)) != 3:
        raise UserError(
            f"feature_loss '{path}' takes images of {channels} channels. It must take RGB images."
        )
    # A pooler comes after all hidden states, so its weights have no effect and may be missing.
    if lost := sorted(name for name in missing if "pooler" not in name):
        raise UserError(
            f"feature_loss '{path}' has no weights for {len(lost)} tensors of its network, such as "
            f"{lost[0]}. They would be random. Give a folder with all weights."
        )


def _check_size(loss: FeatureLoss, path: str, height: int, width: int) -> None:
    """Raise UserError unless the network returns finite features of images of this size."""
    device = loss.mean.device
    try:
        with torch.no_grad():
            features = loss.features(torch.zeros(1, 3, height, width, device=device))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"feature_loss '{path}' gives no features of images of {height} x {width} px: "
            f"{first_line(error)}"
        ) from error
    if not features or not all(x.numel() and x.isfinite().all() for x in features):
        raise UserError(
            f"feature_loss '{path}' gives no finite features of images of {height} x {width} px. "
            "Give larger images, or another network."
        )


def _distance(target: Tensor, features: Tensor) -> Tensor:
    """Return the mean of 1 - cosine similarity over the positions of a layer, for each image."""
    difference = unit_features(features) - unit_features(target)
    return 0.5 * difference.square().sum(dim=1).mean(dim=1)


def _patch_size(config: Any) -> int:
    """Return the number by which image sides must be divisible: 1 for convolutional networks."""
    if getattr(config, "num_attention_heads", None) is None:
        return 1
    patch = getattr(config, "patch_size", None) or 1
    return patch if isinstance(patch, int) else max(patch)


def _colours(path: str, **options: bool) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the colours that the network expects."""
    from transformers.utils import cached_file

    file = cached_file(path, _PROCESSOR, _raise_exceptions_for_missing_entries=False, **options)
    values = json.loads(Path(file).read_text()) if file else {}
    if not values.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    colours = [
        values.get("image_mean") or list(IMAGENET_MEAN),
        values.get("image_std") or list(IMAGENET_STD),
    ]
    if any(len(values) != 3 for values in colours) or min(colours[1]) <= 0:
        raise ValueError(f"{_PROCESSOR} has no image_mean and image_std of three colours")
    return colours[0], colours[1]


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Turn off the loading report and progress bar of `transformers` inside the context."""
    from transformers.utils import logging

    kept, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(kept)
        if shows:
            logging.enable_progress_bar()
