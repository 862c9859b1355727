"""Build the networks and losses of an autoencoder's run, in the same way on each rank."""

from typing import Any

import torch
from accelerate import Accelerator

from latentvae.compute.compilation import compile_blocks
from latentvae.compute.upsampling import fold_upsampling
from latentvae.compute.winograd.convolutions import swap_convolutions
from latentvae.data import ImageSource
from latentvae.distributed import is_main, send_from_main
from latentvae.engine.processes import DTYPES
from latentvae.losses.discriminators import Discriminator, build_discriminator
from latentvae.losses.feature_loss import FeatureLoss, load_feature_loss
from latentvae.losses.objective import Objective
from latentvae.losses.objective.build_objective import build_objective
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import FAMILIES, TrainingWrapper, keep_batch_statistics
from latentvae.models.low_rank import add_adapters
from latentvae.tasks.autoencoder.codebook import initialise_codebook
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.fine_tuning import Base
from latentvae.tasks.autoencoder.images import eval_transform


def build_net(config: TrainConfig, base: Base | None) -> Any:
    """Return the pretrained network of a fine-tuning, or a new network."""
    family = FAMILIES[config.model.architecture]
    if base is not None:
        net = base.net
    else:
        net = family.build(
            **config.model.shape(),
            image_channels=config.data.image_channels,
            sample_size=max(config.data.size),
        )
    family.write_constants(net, config.model)
    return net


def open_features(config: TrainConfig) -> FeatureLoss | None:
    """Return the frozen network whose features `feature_loss` compares, or None without this loss.

    Raises:
        UserError: the network does not exist, or it cannot take the training images.
    """
    path = config.objective.feature_loss
    return None if path is None else load_feature_loss(path, sizes=config.train_sizes)


def build_losses(
    config: TrainConfig, net: Any, accelerator: Accelerator, *, features: FeatureLoss | None
) -> tuple[PerceptualLoss, Objective]:
    """Return LPIPS for the validation (always in float32), and the loss of the model.

    A loss with LPIPS uses the same LPIPS network as the validation. `features` is the network of
    the option `feature_loss`, or None.
    """
    options = config.objective
    metric = PerceptualLoss(
        load_lpips(
            options.lpips_net,
            weights=options.lpips_weights,
            allow_download=options.download_lpips,
        )
    ).to(accelerator.device)

    objective = build_objective(
        options,
        config.discriminator,
        perceptual=metric,
        latent_weights=config.model.bottleneck.weights(),
        has_kl=config.model.has_kl,
        features=None if features is None else features.to(accelerator.device),
        likelihood=FAMILIES[config.model.architecture].likelihood(net),
        autocast_dtype=DTYPES[accelerator.mixed_precision],
    )
    return metric, objective


def build_wrapper(config: TrainConfig, net: Any, *, pretrained: bool) -> TrainingWrapper:
    """Return a module that wraps the network for training.

    Upsampling layers are merged into the convolutions after them. The options decide whether the
    encoder is frozen.
    """
    family = FAMILIES[config.model.architecture]
    if pretrained:
        keep_batch_statistics(net)
    if config.model.freeze_encoder:
        family.freeze_encoder(net)
    if config.run.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    fold_upsampling(net)
    adapt_decoder(config, net)
    return family.wrap(
        net,
        config.model,
        output_logvar=config.objective.output_logvar,
        learn_logvar=config.objective.learn_logvar,
    )


def adapt_decoder(config: TrainConfig, net: Any) -> None:
    """Add low-rank adapters to the decoder and freeze all other weights, if `lora_rank` is set."""
    if config.low_rank:
        decoder = FAMILIES[config.model.architecture].decoder(net)
        add_adapters(net, decoder, rank=config.low_rank)


def start_codebook(
    config: TrainConfig, net: Any, accelerator: Accelerator, images: ImageSource
) -> None:
    """Initialise the codes by k-means on the first rank, and send them to all ranks."""
    run = config.run
    per_process = run.train_batch_size * run.gradient_accumulation_steps
    net.to(accelerator.device)
    if is_main():
        initialise_codebook(
            net,
            images,
            eval_transform(config),
            images_per_update=per_process * accelerator.num_processes,
            seed=run.seed,
        )
    for quantizer in FAMILIES[config.model.architecture].quantizers(net):
        send_from_main(quantizer.state_dict().values())  # DDP would not send buffers


def discriminator_of(config: TrainConfig) -> Discriminator | None:
    """Return a new discriminator, or None if the weight of its loss is 0."""
    options = config.discriminator
    if options.disc_scale == 0:
        return None
    return build_discriminator(
        options.disc_type,
        image_size=min(config.train_sizes, key=min),
        channels=options.disc_channels,
        num_layers=options.disc_layers,
        norm=options.disc_norm,
    )


def compute_faster(
    config: TrainConfig, net: Any, metric: PerceptualLoss, accelerator: Accelerator
) -> None:
    """Compile the network's blocks, or use Winograd's convolutions, if the options say so."""
    if config.run.torch_compile:
        accelerator.print("the first updates compile the network, which takes minutes", flush=True)
        compile_blocks(net)
    elif _multiplies_less(config, accelerator):
        swap_convolutions(net, trained=True)
        # With the channels last in memory, every convolution would transpose its input.
        swap_convolutions(metric.to(memory_format=torch.contiguous_format), trained=True)


def _multiplies_less(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Return whether to use Winograd's convolutions: only on CPUs, in float32, channels first."""
    on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    return config.run.winograd and on_cpu and not config.run.channels_last
