"""Train a KL autoencoder as a widely copied script does, but without the script's faults.

The script is examples/research_projects/autoencoderkl/train_autoencoderkl.py of
huggingface/diffusers at 58eb52c. This benchmark has the same losses and order of computation as
that script:

- The loss is (squared error + 0.5 LPIPS (VGG)), summed over pixels, plus 1e-6 times the KL.
- Gradients are clipped to norm 1. AdamW has weight decay 0.01. All computation is in float32.
- Images are centre-cropped, without augmentation.
- In every update, the losses for the progress bar are copied from the device to the CPU.

The network, the resolution and the batch size are those of the preset `kl_small`. The learning rate
and its schedule are not the defaults of diffusers' script.

The discriminator of diffusers' script starts at update 50,001. This benchmark has no discriminator.
The benchmark corrects these faults of diffusers' script:

- LPIPS has the true pretrained weights, and its gradient reaches the model.
- The weights of the model are not cast to another dtype after the optimiser is built.
- The learning-rate schedule counts the updates of the model.
- Nothing is computed for a discriminator that does not learn yet.

    python benchmarks/reference.py --train_data_dir photos --updates 3000 --out plain

This benchmark writes the weights as <update>.safetensors, and log.jsonl with the speed. Like
diffusers' script without --use_ema, the benchmark computes no moving average of the weights.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentvae.cli.flags import exit_with, parse_options
from latentvae.compute.memory import keep_freed_memory
from latentvae.data import ImageSource
from latentvae.engine.log import append_row
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import build_autoencoder_kl
from latentvae.tasks.autoencoder import load_preset
from latentvae.tasks.autoencoder.images import open_data

KL_SCALE, PERCEPTUAL_SCALE = 1e-6, 0.5
LEARNING_RATE, WARMUP = 1e-3, 100
LOG_STEPS = 10


class CentreCrops(Dataset[Tensor]):
    """A dataset of centre crops.

    Each image is first resized, so that its shorter side equals the resolution.

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
class Options:
    """What to train on, and for how long."""

    train_data_dir: str
    """Folder of training images."""

    out: Path
    """Folder for the weights and log.jsonl."""

    updates: int
    """Number of updates."""

    validation_data_dir: str | None = None
    """Folder of unseen images. By default, the script holds out the same images for validation as
    `train_kl.py` does."""

    save_every: int = 500
    """Number of updates from one save of the weights to the next. The weights are also saved after
    the last update."""

    seed: int = 0
    """Seed of the initial weights, of the order of the images, and of the choice of held-out
    images."""


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
) -> Iterator[float]:
    """Train ``net`` in place. After each update, yield the seconds that this update took.

    The learning rate rises for ``warmup`` updates. Then the learning rate falls along a cosine
    until update ``updates``.
    """
    # data, optimiser and schedule
    torch.manual_seed(seed)
    loader = DataLoader(CentreCrops(source, resolution), batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=warmup, num_training_steps=updates
    )
    batches = _endless(loader)

    # updates
    for _ in range(updates):
        start = time.perf_counter()
        loss = reference_loss(net, next(batches), perceptual)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        yield time.perf_counter() - start


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


def run(options: Options) -> None:
    """Train the network of the preset `kl_small` like diffusers' script, and save the weights."""
    # images and network, as in the preset `kl_small`
    keep_freed_memory(torch.device("cpu"))
    config = load_preset("kl_small").with_changes(
        {
            "data": {
                "train_data_dir": options.train_data_dir,
                "validation_data_dir": options.validation_data_dir,
            },
            "run": {"seed": options.seed},
        }
    )
    source: Any = open_data(config)[0]  # a folder, not a stream
    torch.manual_seed(options.seed)
    shape: dict[str, Any] = config.model.shape() | {"initial_posterior_logvar": 0.0}
    net = build_autoencoder_kl(**shape)

    # updates
    batch, seconds = config.run.train_batch_size, 0.0
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "log.jsonl").unlink(missing_ok=True)
    trained = train_reference(
        net,
        source,
        PerceptualLoss(load_lpips("vgg")),
        resolution=config.data.size[0],
        batch_size=batch,
        updates=options.updates,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
        seed=options.seed,
    )
    for update, elapsed in enumerate(trained, start=1):
        seconds += elapsed
        if update % LOG_STEPS == 0:
            speed = LOG_STEPS * batch / seconds
            row = {"update": update, "images": update * batch, "time/images_per_second": speed}
            append_row(options.out / "log.jsonl", row)
            seconds = 0.0
        if update % options.save_every == 0 or update == options.updates:
            save_file(net.state_dict(), options.out / f"{update}.safetensors")


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="reference.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
