"""Discretise a pretrained KL autoencoder: start its new quantiser, and choose which parts learn.

The adapter is the two 1x1 convolutions before and after the quantiser. First the adapter and the
codes are set from training images. Then only the quantiser and its adapter learn, for
`quantizer_warmup_steps` updates. After these updates, the decoder learns too, and with
`train_encoder` also the encoder.
"""

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentvae.bottlenecks.bottleneck_config import LearnedCodebookConfig
from latentvae.data import ImageSource, ImageStream
from latentvae.distributed import send_from_main
from latentvae.engine.randomness import Stream, generator_for
from latentvae.errors import UserError
from latentvae.models.conv.discretise import fit_decoder_side, start_adapter
from latentvae.tasks.autoencoder.codebook import computed_alone, initialise_codebook, wants_start
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.fine_tuning import Base
from latentvae.tasks.autoencoder.images import eval_transform
from latentvae.tasks.autoencoder.linear_start import training_pictures


def check_discretising(config: TrainConfig, base: Base | None) -> None:
    """Check the options for a new quantiser in a pretrained KL autoencoder.

    Raises:
        UserError: an option has no effect or does not fit a new quantiser. The message names the
            option.
    """
    # a new quantiser
    discretises = base is not None and base.discretised
    if discretises and config.model.freeze_encoder:
        raise UserError(
            "freeze_encoder keeps the tokens of a pretrained tokenizer, but the quantiser of a "
            "discretised KL autoencoder is new. Leave freeze_encoder out: without train_encoder, "
            "the encoder keeps its weights."
        )
    bottleneck = config.model.bottleneck
    learned = isinstance(bottleneck, LearnedCodebookConfig)
    if discretises and learned and not bottleneck.starts_by_kmeans:
        raise UserError(
            f"config {config.config} has a codebook of random codes, and most of them would never "
            "be near the latents of the KL autoencoder. Give --kmeans_iterations 10."
        )

    # when its parts learn
    if trains_encoder(config) and warmup_steps(config) >= config.run.max_train_steps:
        raise UserError(
            f"train_encoder has no effect, because quantizer_warmup_steps {warmup_steps(config)} "
            f"lasts until the end of the run ({config.run.max_train_steps} updates). Leave one out."
        )

    # options without a new quantiser
    given = {
        "quantizer_warmup_steps": warmup_steps(config),
        "train_encoder": trains_encoder(config),
    }
    for name, value in given.items():
        if value and not discretises:
            raise UserError(
                f"{name} {value} has an effect only if pretrained_model_name_or_path is a KL "
                "autoencoder. Leave it out."
            )


def warmup_steps(config: TrainConfig) -> int:
    """Return the number of updates in which only the quantiser and the layers next to it learn."""
    return getattr(config.model, "quantizer_warmup_steps", 0)


def trains_encoder(config: TrainConfig) -> bool:
    """Return whether the encoder of a discretised KL autoencoder learns after the warm-up."""
    return getattr(config.model, "train_encoder", False)


def waiting_parts(config: TrainConfig, net: Any) -> list[nn.Module]:
    """Return the parts of the network that learn only after a new quantiser's warm-up.

    These parts are the decoder and, with `train_encoder`, also the encoder. Without a warm-up, the
    list is empty.
    """
    if warmup_steps(config) == 0:
        return []
    return [net.decoder, net.encoder] if trains_encoder(config) else [net.decoder]


@torch.no_grad()
def start_quantizer(
    config: TrainConfig,
    net: Any,
    accelerator: Accelerator,
    *,
    images: ImageSource | ImageStream,
    codebook_images: ImageSource,
) -> None:
    """Set a new quantiser's codes and adapter (the layers next to it) from training images.

    Rank 0 computes codes and adapter, and sends them to all ranks.

    Args:
        net: the network, before its upsampling layers are merged into convolutions.
        images: training images.
        codebook_images: images for k-means.

    Raises:
        UserError: no image can be read.
    """
    net.to(accelerator.device)
    pictures = training_pictures(config, images)
    if pictures is not None:
        _start(config, net, pictures, accelerator, codebook_images)

    for part in (net.quantize, net.quant_conv, net.post_quant_conv):
        send_from_main(part.state_dict().values())


def _start(
    config: TrainConfig,
    net: Any,
    pictures: Tensor,
    accelerator: Accelerator,
    codebook_images: ImageSource,
) -> None:
    start, run, bottleneck = time.monotonic(), config.run, config.model.bottleneck
    start_adapter(
        net,
        pictures,
        whiten=bottleneck.whitened_start,
        on_sphere=getattr(bottleneck, "l2_normalize", False),
        generator=generator_for(Stream.WEIGHTS, run.seed, 2),
    )

    if wants_start(config):
        per_process = run.train_batch_size * run.gradient_accumulation_steps
        initialise_codebook(
            net,
            codebook_images,
            eval_transform(config),
            images_per_update=per_process * accelerator.num_processes,
            seed=run.seed,
        )

    with computed_alone(net):
        fit_decoder_side(net, pictures)
    seconds = time.monotonic() - start
    print(
        f"set the adapter of the quantiser from {len(pictures)} images in {seconds:.1f} s",
        flush=True,
    )
