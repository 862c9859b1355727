"""What a run is made of: everything is checked and built here, before the first update."""

import gc
import hashlib
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latentvae.compute.compilation import compile_blocks
from latentvae.compute.upsampling import fold_upsampling
from latentvae.compute.winograd.layers import swap_convolutions
from latentvae.config.autoencoder import TrainConfig
from latentvae.data import (
    DatasetSpec,
    EvalTransform,
    HubImages,
    ImageSource,
    ImageStream,
    PixelFormat,
    Subset,
    TrainTransform,
    open_images,
    open_source,
)
from latentvae.data.folder import SAMPLES
from latentvae.distributed import is_main, send_from_main
from latentvae.engine.randomness import Stream, seed_everything
from latentvae.engine.weight_average import WeightAverage
from latentvae.errors import UserError
from latentvae.losses.adversarial import LeCam
from latentvae.losses.discriminators import Critic, build_critic
from latentvae.losses.objective import Objective
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import (
    ARCHITECTURES,
    TrainingWrapper,
    freeze_encoder,
    keep_batch_statistics,
)
from latentvae.models.config import VQModelConfig
from latentvae.tasks.autoencoder.base import Base
from latentvae.tasks.autoencoder.codebook import initialise_codebook, wants_start

STREAM_HELD_OUT = 256  # first images of a stream, to validate on
_DTYPES = {"no": None, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class Run:
    """The parts of a run. ``wrapper`` and ``critic`` are bare; their ``prepared`` twins are what is
    called in training."""

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    train_images: ImageSource | ImageStream
    validation_images: ImageSource
    wrapper: TrainingWrapper
    prepared: nn.Module
    optimizer: torch.optim.Optimizer
    critic: Critic | None
    critic_prepared: nn.Module | None
    critic_optimizer: torch.optim.Optimizer | None
    ema: EMAModel | None
    objective: Objective
    metric: PerceptualLoss
    data_identity: dict[str, Any]
    base: Base | None = None
    lecam: LeCam | None = None

    @property
    def net(self) -> Any:
        return self.wrapper.net

    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The average of each weight of the network; empty without averages."""
        if self.ema is None:
            return {}
        return dict(zip(self.net.parameters(), self.ema.shadow_params, strict=True))

    @property
    def images_per_update(self) -> int:
        return _images_per_update(self.config, self.accelerator)


def _images_per_update(config: TrainConfig, accelerator: Accelerator) -> int:
    run = config.run
    return run.train_batch_size * run.gradient_accumulation_steps * accelerator.num_processes


def open_data(config: TrainConfig) -> tuple[ImageSource | ImageStream, ImageSource]:
    """Training and validation images."""
    data, spec = config.data, _spec(config)
    pixels = PixelFormat(data.image_channels, data.value_range)
    if isinstance(spec, DatasetSpec) and data.streaming:
        validation = data.validation_data_dir
        held_out = 0 if validation else STREAM_HELD_OUT
        stream = ImageStream(
            spec, held_out=held_out, shuffle_buffer=data.shuffle_buffer, pixels=pixels
        )
        if not validation:
            return stream, stream.held_out
        return stream, open_source(validation, pixels=pixels)
    return open_images(
        spec,
        validation_data_dir=data.validation_data_dir,
        split_share=data.validation_share,
        seed=config.run.seed,
        max_train_samples=data.max_train_samples,
        pixels=pixels,
    )


def _spec(config: TrainConfig) -> str | DatasetSpec:
    """A path as it is; a name of a data set, or a path with options of `datasets`, as such."""
    data = config.data
    name = data.dataset_name or data.train_data_dir
    assert name is not None
    plain = data.dataset_config_name is data.image_column is data.cache_dir is None
    plain = plain and data.dataset_split == "train"
    if name == SAMPLES or (data.dataset_name is None and plain):
        return name
    return DatasetSpec(
        name=name,
        config_name=data.dataset_config_name,
        split=data.dataset_split,
        image_column=data.image_column,
        cache_dir=data.cache_dir,
    )


def train_transform(config: TrainConfig) -> TrainTransform:
    data = config.data
    return TrainTransform(
        data.size,
        crop=data.crop,
        crop_scale=(data.crop_min_side, 1.0),
        random_flip=data.random_flip,
        interpolation=data.image_interpolation_mode,
        resize_with=data.resize_with,
        jpeg_draft=data.jpeg_draft,
    )


def eval_transform(config: TrainConfig) -> EvalTransform:
    return EvalTransform(config.data.size, interpolation=config.data.image_interpolation_mode)


def start_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Join the other ranks; precision as configured, or as the launcher was told."""
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process stays
    accelerator = Accelerator(
        mixed_precision=config.run.mixed_precision,
        log_with=None if config.run.report_to == "none" else config.run.report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(static_graph=False, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.ddp_timeout)),
        ],
    )
    if accelerator.mixed_precision not in _DTYPES:
        raise UserError(
            f"the launcher asks for mixed precision {accelerator.mixed_precision}, which "
            "two optimisers on one gradient scaler get wrong; "
            "allowed are bf16 and no"
        )
    return accelerator


def end_accelerator(accelerator: Accelerator) -> None:
    """Take the process group down with all that uses it: a group that lives on to the end of the
    interpreter ends it with SIGABRT now and then (https://github.com/pytorch/pytorch/issues/190489).
    """
    accelerator.free_memory()
    gc.collect()  # hooks and generators keep the prepared networks in circles
    accelerator.end_training()


def build_run(
    config: TrainConfig,
    *,
    folder: Path,
    accelerator: Accelerator,
    data: tuple[ImageSource | ImageStream, ImageSource],
    base: Base | None = None,
    from_checkpoint: bool = False,
) -> Run:
    """Networks, optimisers and losses, the same on every rank: freshly initialised from the seed,
    but for a base and what a checkpoint will overwrite."""
    seed_everything(Stream.WEIGHTS, config.run.seed)
    net = build_net(config, base)
    metric, objective = _losses(config, net, accelerator)
    if base is not None:
        keep_batch_statistics(net)
    if config.model.freeze_encoder:
        freeze_encoder(net)
    if config.run.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    fold_upsampling(net)
    wrapper = ARCHITECTURES[config.model.architecture].wrapper(
        net,
        output_logvar=config.objective.output_logvar,
        learn_logvar=config.objective.learn_logvar,
    )
    if wants_start(config) and base is None and not from_checkpoint:
        net.to(accelerator.device)
        if is_main():
            source = data[1] if isinstance(data[0], ImageStream) else data[0]
            initialise_codebook(
                net,
                source,
                eval_transform(config),
                images_per_update=_images_per_update(config, accelerator),
                seed=config.run.seed,
            )
        send_from_main(net.quantize.state_dict().values())  # DDP would leave buffers alone
    critic, lecam, options = None, None, config.critic
    if options.disc_scale > 0:
        critic = build_critic(
            options.disc_type,
            image_size=min(config.train_sizes, key=min),
            channels=options.disc_channels,
            num_layers=options.disc_layers,
            norm=options.disc_norm,
        )
        if options.disc_lecam_weight > 0:
            lecam = LeCam(device=accelerator.device)
    if config.run.channels_last:
        wrapper.to(memory_format=torch.channels_last)
        if critic is not None:
            critic.to(memory_format=torch.channels_last)
    if config.run.torch_compile:
        compile_blocks(net)
    elif _multiplies_less(config, accelerator):
        swap_convolutions(net, trained=True)
        # Channels innermost would be turned for every convolution.
        swap_convolutions(metric.to(memory_format=torch.contiguous_format), trained=True)
    with warnings.catch_warnings():  # newer torch has another name for it, which Accelerate has not
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        prepared = accelerator.prepare(wrapper)
        critic_prepared = accelerator.prepare(critic) if critic is not None else None
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        train_images=data[0],
        validation_images=data[1],
        wrapper=wrapper,
        prepared=prepared,
        optimizer=_adamw(wrapper, config, rate=config.optimizer.learning_rate),
        critic=critic,
        critic_prepared=critic_prepared,
        critic_optimizer=None
        if critic is None
        else _adamw(critic, config, rate=config.critic.disc_learning_rate),
        ema=_ema(net, config),
        objective=objective,
        metric=metric,
        data_identity=data_identity(data[0]),
        base=base,
        lecam=lecam,
    )


def data_identity(images: ImageSource | ImageStream) -> dict[str, Any]:
    """What must not change under a run: number and names (hashed) of the images, which decide their
    order; of rows that have no names, and of streams, which rows they are.

    Where a local data set lies is not part of it.
    """
    if isinstance(images, ImageStream):
        return {
            "data set": Path(images.name).name if Path(images.name).exists() else images.name,
            "configuration": images.config_name,
            "split": images.split,
            "column": images.column,
        }
    digest = hashlib.sha256()
    for i in range(len(images)):
        digest.update(images.name(i).encode(errors="surrogateescape") + b"\0")
    identity = {"images": len(images), "names_sha256": digest.hexdigest()}
    whole = images
    while isinstance(whole, Subset):
        whole = whole.source
    if isinstance(whole, HubImages) and whole.numbered:
        identity |= {"configuration": whole.origin[1], "column": whole.column}
    return identity


def build_net(config: TrainConfig, base: Base | None) -> Any:
    """The base's network, or a new one."""
    if base is not None:
        return base.net
    model, options = config.model, config.model.shape()
    options["image_channels"] = config.data.image_channels
    if model.architecture != "dc":  # the one without tiling by the training size
        options["sample_size"] = max(config.data.size)
    return ARCHITECTURES[model.architecture].build(**options)


def _losses(
    config: TrainConfig, net: Any, accelerator: Accelerator
) -> tuple[PerceptualLoss, Objective]:
    """LPIPS to validate with (always float32) and the objective, whose LPIPS may be the same
    network."""
    options = config.objective
    metric = PerceptualLoss(
        load_lpips(
            options.lpips_net,
            weights=options.lpips_weights,
            allow_download=options.download_lpips,
        )
    ).to(accelerator.device)
    objective = Objective(
        rec_loss=options.rec_loss,
        perceptual=metric if options.perceptual_scale > 0 else None,
        perceptual_scale=options.perceptual_scale,
        kl_scale=options.kl_scale,
        latent_weights=latent_weights(config),
        likelihood=getattr(net, "likelihood", None),
        autocast_dtype=_DTYPES[accelerator.mixed_precision],
    )
    return metric, objective


def _multiplies_less(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether Winograd's convolutions serve: float32 on the CPU, channels outermost."""
    on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    return config.run.winograd and on_cpu and not config.run.channels_last


def latent_weights(config: TrainConfig) -> dict[str, float]:
    """Of the terms of a discrete bottleneck."""
    model = config.model
    return model.quantizer.weights() if isinstance(model, VQModelConfig) else {}


def _adamw(module: nn.Module, config: TrainConfig, *, rate: float) -> torch.optim.AdamW:
    options = config.optimizer
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,
    )


def _ema(net: nn.Module, config: TrainConfig) -> EMAModel | None:
    if not config.optimizer.use_ema:
        return None
    return WeightAverage(list(net.parameters()), decay=config.optimizer.ema_decay, foreach=True)
