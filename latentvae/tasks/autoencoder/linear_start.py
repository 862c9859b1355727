"""Set the initial weights of a new network so that it computes a linear code (`--init linear`).

The linear code is the principal components of patches of training images, which are cropped and
augmented as in training. Rank 0 computes the weights and sends them to all ranks.
"""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentvae.data import ImageSource, ImageStream
from latentvae.distributed import is_main, send_from_main
from latentvae.engine.randomness import Stream, generator_for
from latentvae.errors import UserError
from latentvae.models import Network, family_of
from latentvae.models.conv.linear_start import patch_codes, start_decoder, start_encoder
from latentvae.tasks.autoencoder.codebook import computed_alone, initialise_codebook, wants_start
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.images import batches, eval_transform

PIXELS = 2**20  # in all images together, such as 256 images of 64 x 64 pixels
FEWEST, MOST = 64, 256  # limits of the number of images
CHUNK = 16  # images encoded at a time


@torch.no_grad()
def start_linear(
    config: TrainConfig,
    net: Any,
    accelerator: Accelerator,
    *,
    images: ImageSource | ImageStream,
    codebook_images: ImageSource,
) -> None:
    """Set a new network's weights (and a tokenizer's codes) so that it computes a linear code.

    The linear code is the principal components of image patches.

    Args:
        net: the network, before its upsampling layers are merged into convolutions.
        images: training images.
        codebook_images: images for k-means.

    Raises:
        UserError: the network has too few channels, or no image can be read.
    """
    # rank 0 computes
    pictures = training_pictures(config, images)
    if pictures is not None:
        _start(config, net, pictures, accelerator, codebook_images)

    # send its weights to all ranks
    net.to(accelerator.device)
    send_from_main(net.state_dict().values())


def training_pictures(config: TrainConfig, images: ImageSource | ImageStream) -> Tensor | None:
    """Return cropped and augmented training images, (N, C, H, W).

    N is from 64 to 256. Within these limits, all images together have about `PIXELS` pixels.

    All ranks call this function, and ranks other than 0 get None.

    Raises:
        UserError: no image can be read.
    """
    own = config.with_changes({"data": {"dataloader_num_workers": 0}})
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from torch's generator
        loader, _ = batches(own, images, start_step=0, pin_memory=False)
        return _gather(config, loader) if is_main() else None


def _start(
    config: TrainConfig,
    net: Any,
    pictures: Tensor,
    accelerator: Accelerator,
    codebook_images: ImageSource,
) -> None:
    start, bottleneck = time.monotonic(), config.model.bottleneck
    codes = patch_codes(pictures, levels=int(math.log2(config.model.f)))
    d = family_of(net).latent_shape(net).channels
    start_encoder(net, codes, d=d, whiten=bottleneck.whitened_start)

    # Networks compute on the device, but principal components and least squares on the CPU.
    net.to(accelerator.device)

    # choose a tokenizer's codes from features of the linear encoder
    if wants_start(config):
        run = config.run
        per_process = run.train_batch_size * run.gradient_accumulation_steps
        initialise_codebook(
            net,
            codebook_images,
            eval_transform(config),
            images_per_update=per_process * accelerator.num_processes,
            seed=run.seed,
        )

    start_decoder(net, codes, _latents(net, pictures, seed=config.run.seed), pictures)
    print(f"linear start: {len(pictures)} images, {time.monotonic() - start:.1f} s", flush=True)


def _gather(config: TrainConfig, loader: Any) -> Tensor:
    """Return `FEWEST` to `MOST` images of the first batch's size, in all about `PIXELS` pixels."""
    found: list[Tensor] = []
    wanted = FEWEST
    for batch in loader:
        images = batch.on(torch.device("cpu"))
        height, width = (side // config.model.f * config.model.f for side in images.shape[2:])
        images = images[:, :, :height, :width]
        if not found or images.shape[1:] == found[0].shape[1:]:
            found.append(images)
        wanted = min(max(FEWEST, PIXELS // (height * width)), MOST)
        if sum(map(len, found)) >= wanted:
            break
    if not found:
        raise UserError("none of the training images can be read")
    return torch.cat(found)[:wanted]


def _latents(net: Network, pictures: Tensor, *, seed: int) -> Tensor:
    """Return the decoder's input (N, d, h, w): samples of the posterior, or codes."""
    family, generator = family_of(net), generator_for(Stream.WEIGHTS, seed, 1)
    quantizers = family.quantizers(net)  # at most one: only networks with one latent start here
    found = []
    with computed_alone(net):
        for part in pictures.split(CHUNK):
            z = family.encode(net, part.to(net.device), sample=not quantizers, generator=generator)
            found.append((quantizers[0](z).z if quantizers else z).cpu())
    return torch.cat(found)
