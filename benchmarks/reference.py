"""Train a KL autoencoder as a widely copied script does, but without the script's faults.

The script is examples/research_projects/autoencoderkl/train_autoencoderkl.py of
huggingface/diffusers at 58eb52c. Losses, defaults and order of computation are the same here:

- The loss is the squared error summed over pixels, plus 0.5 LPIPS (VGG) and 1e-6 times the KL.
- Gradients are clipped to norm 1. AdamW has weight decay 0.01. All computation is in float32.
- Images are centre-cropped, without augmentation.
- In every update, values for the progress bar are read from the device.

The script's discriminator starts at update 50,001 and is left out here. These faults of the script
are corrected:

- LPIPS has the true pretrained weights, and its gradient reaches the model.
- The weights of the model are not cast after the optimiser is built.
- The learning-rate schedule counts the updates of the model.
- There is no computation for a discriminator before it starts.
- Both the raw and the averaged weights are kept.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentvae.data import ImageSource
from latentvae.losses.perceptual import PerceptualLoss

KL_SCALE, PERCEPTUAL_SCALE = 1e-6, 0.5
EMA_DECAY = 0.999


class CentreCrops(Dataset[Tensor]):
    """A dataset of centre crops. Before, each image's shorter side is resized to the resolution.

    The resize filter is bilinear, which is torchvision's default.
    """

    def __init__(self, source: ImageSource, resolution: int) -> None:
        self.source = source
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        image, side = self.source.read(index), self.resolution
        assert isinstance(image, Image.Image)
        scale = side / min(image.size)
        width, height = (round(length * scale) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1.0


@dataclass(frozen=True)
class Trained:
    """The networks after a training, and the seconds of each update.

    One network has the raw weights, and the other network has the averaged weights.
    """

    raw: AutoencoderKL
    averaged: AutoencoderKL
    seconds: list[float]


def train_reference(
    net: AutoencoderKL,
    source: ImageSource,
    perceptual: PerceptualLoss,
    *,
    resolution: int,
    batch_size: int,
    updates: int,
    learning_rate: float,
    warmup: int,
    seed: int,
) -> Trained:
    """Train ``net`` in place, with a cosine learning-rate schedule over ``updates`` updates."""
    # data, optimiser, schedule and average
    torch.manual_seed(seed)
    loader = DataLoader(CentreCrops(source, resolution), batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=warmup, num_training_steps=updates
    )
    ema = EMAModel(list(net.parameters()), decay=EMA_DECAY)
    batches = _endless(loader)

    # updates
    ends = [time.perf_counter()]
    for _ in range(updates):
        loss = reference_loss(net, next(batches), perceptual)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        ema.step(net.parameters())
        ends.append(time.perf_counter())

    averaged = copy.deepcopy(net)
    ema.copy_to(averaged.parameters())
    return Trained(net, averaged, [end - start for start, end in pairwise(ends)])


def reference_loss(net: AutoencoderKL, images: Tensor, perceptual: PerceptualLoss) -> Tensor:
    """Return the loss, summed over pixels and latent elements and averaged over images."""
    coder: Any = net
    posterior = coder.encode(images).latent_dist
    recon = coder.decode(posterior.sample()).sample
    rec_loss = F.mse_loss(recon, images, reduction="none")
    p_loss = perceptual(images, recon)[:, None, None, None]
    nll_loss = (rec_loss + PERCEPTUAL_SCALE * p_loss).sum() / len(images)
    kl_loss = posterior.kl().sum() / len(images)
    loss = nll_loss + KL_SCALE * kl_loss
    # The script reads these values in every update, for its progress bar and tracker.
    _ = [value.detach().mean().item() for value in (loss, nll_loss, rec_loss, p_loss, kl_loss)]
    return loss


def _endless(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader
