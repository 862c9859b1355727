"""What a fine-tuning starts from: the network, and what is remembered of it in the run's folder.

A run goes on without the base's weights: `base.json` holds its config, the checkpoint the rest.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from latentvae.errors import UserError
from latentvae.models import load_network
from latentvae.training.checkpoint import newest_usable
from latentvae.training.config import TrainConfig
from latentvae.training.presets import parse

BASE_NAME = "base.json"
SHAPE = (  # options of the model section that the base decides
    "block_out_channels layers_per_block latent_channels norm_num_groups mid_block_add_attention "
    "use_quant_conv"
).split()


@dataclass(frozen=True)
class Base:
    """A pretrained network.

    Args:
        name: as the user gave it.
        net: float32, on the CPU; freshly initialised where a run goes on.
        encoder_sha256: of its encoder's weights, as they were loaded.
        hub_id: owner/name on the Hub, if it came from there.
    """

    name: str
    net: AutoencoderKL
    encoder_sha256: str
    hub_id: str | None = None

    def write(self, folder: Path) -> None:
        config = {key: value for key, value in self.net.config.items() if key[0] != "_"}
        values = {
            "name": self.name,
            "hub_id": self.hub_id,
            "encoder_sha256": self.encoder_sha256,
            "config": config,
        }
        temporary = folder / f"{BASE_NAME}.tmp"
        temporary.write_text(json.dumps(values, indent=1))
        temporary.replace(folder / BASE_NAME)


def open_base(config: TrainConfig) -> Base | None:
    """The network that `pretrained_model_name_or_path` names; None without it.

    A run that is to go on in its folder needs no weights but the checkpoint's, and takes the config
    that it started with.

    Raises:
        UserError: it cannot be loaded, or is no AutoencoderKL.
    """
    name, folder = config.model.pretrained_model_name_or_path, config.run.output_dir
    if name is None:
        return None
    if folder is not None and not config.run.overwrite_output_dir:
        begun = read_base(Path(folder))
        # Without a checkpoint there are no weights to go on with but the base's own.
        checkpoint = None if begun is None else newest_usable(Path(folder))[0]
        if begun is not None and begun.name == name and checkpoint is not None:
            return begun
    net = load_network(name, family=config.model.pretrained_family)
    if not isinstance(net, AutoencoderKL):
        raise UserError(
            f"'{name}' is a {type(net).__name__}; this trainer fine-tunes AutoencoderKL networks"
        )
    if net.config["in_channels"] != 3:
        raise UserError(
            f"'{name}' takes {net.config['in_channels']}-channel images; this trainer has RGB"
        )
    # Out of the file's memory map, whose alignment can change sums. In train mode as a new network
    # is: even dropout of probability 0 draws random numbers there.
    net = copy.deepcopy(net).train()
    hub_id = None if Path(name).exists() else "/".join(name.split("/")[:2])
    return Base(name, net, encoder_sha256(net), hub_id)


def read_base(folder: Path) -> Base | None:
    """What a run remembers of its base, with fresh weights; None where it started from nothing."""
    path = folder / BASE_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        net: Any = AutoencoderKL.from_config(values["config"])
        return Base(values["name"], net, values["encoder_sha256"], values.get("hub_id"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not what a fine-tuning wrote: {error}") from error


def with_shape_of(config: TrainConfig, base: Base | None) -> TrainConfig:
    """The configuration with the base's own shape in place of the preset's, checked again."""
    if base is None:
        return config
    values, own = config.model_dump(), base.net.config
    values["model"] |= {name: own[name] for name in SHAPE} | {"attention_levels": ()}
    return parse(values, source="the pretrained network's config")


def freeze_encoder(net: AutoencoderKL) -> None:
    """Nothing that makes latents will learn."""
    for part in _latent_side(net):
        part.requires_grad_(False)


def encoder_sha256(net: AutoencoderKL) -> str:
    """Of all weights that make latents, by their names."""
    digest = hashlib.sha256()
    for part in _latent_side(net):
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            values = value.detach().cpu().float().contiguous()
            digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _latent_side(net: AutoencoderKL) -> Iterator[nn.Module]:
    yield net.encoder
    if net.quant_conv is not None:
        yield net.quant_conv
