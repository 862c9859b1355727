"""What a fine-tuning starts from: the network, and what is remembered of it in the run's folder.

A run goes on without the base's weights: `base.json` holds its config, the checkpoint the rest.
"""

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from latentvae.engine.checkpoint_files import newest_usable
from latentvae.errors import UserError
from latentvae.files import read_json
from latentvae.models import FAMILIES, Network, family_of, load_network
from latentvae.models.loading import check_depth
from latentvae.tasks.autoencoder.config import TrainConfig, parse

BASE_NAME = "base.json"


class _Saved(BaseModel):
    """base.json."""

    name: str
    hub_id: str | None = None
    encoder_sha256: str
    config: dict[str, Any]


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
    net: Network
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
        UserError: it cannot be loaded, or is of another architecture.
    """
    name, folder = config.model.pretrained_model_name_or_path, config.run.output_dir
    if name is None:
        return None
    if folder is not None and not config.run.overwrite_output_dir:
        begun = read_base(Path(folder), config.model.architecture)
        # Without a checkpoint there are no weights to go on with but the base's own.
        checkpoint = None if begun is None else newest_usable(Path(folder))[0]
        if begun is not None and begun.name == name and checkpoint is not None:
            return begun
    model = config.model
    loaded = load_network(name, family=getattr(model, "pretrained_family", None))
    family = FAMILIES[model.architecture]
    net = family.adapt(loaded, model.shape())
    if net is None:
        raise UserError(
            f"'{name}' is a {type(loaded).__name__}; config {config.config} fine-tunes "
            f"{family.network.__name__} networks"
        )
    channels = net.config["in_channels"]
    if channels != config.data.image_channels:
        raise UserError(
            f"'{name}' takes {channels}-channel images, but image_channels is "
            f"{config.data.image_channels}; give --image_channels {channels}, or another base"
        )
    # Out of the file's memory map, whose alignment can change sums. In train mode as a new network
    # is: even dropout of probability 0 draws random numbers there.
    net = copy.deepcopy(net).train()
    hub_id = None if Path(name).exists() else "/".join(name.split("/")[:2])
    return Base(name, net, encoder_sha256(net), hub_id)


def read_base(folder: Path, architecture: str) -> Base | None:
    """What a run remembers of its base, with fresh weights; None where it started from nothing."""
    path = folder / BASE_NAME
    if not path.exists():
        return None
    values = read_json(path)
    try:
        saved = _Saved.model_validate(values)
        check_depth(saved.config, path)
        net: Any = FAMILIES[architecture].network.from_config(saved.config)
    # Not a list of types: a network's class raises what it likes about a config that is not its.
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join(line.strip() for line in lines[:3])
        raise UserError(f"'{path}' is not what a fine-tuning wrote: {reason}") from error
    return Base(saved.name, net, saved.encoder_sha256, saved.hub_id)


def with_shape_of(config: TrainConfig, base: Base | None) -> TrainConfig:
    """The configuration with the base's own shape in place of the preset's, checked again."""
    if base is None:
        return config
    family, values = FAMILIES[config.model.architecture], config.model_dump()
    values["model"] = family.merge_options(values["model"], dict(base.net.config))
    config = parse(values, source="the pretrained network's config")
    family.apply_options(base.net, config.model)
    return config


def encoder_sha256(net: Network) -> str:
    """Of all weights that make latents, by their names."""
    digest = hashlib.sha256()
    for part in family_of(net).latent_side(net):
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            values = value.detach().cpu().float().contiguous()
            digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
