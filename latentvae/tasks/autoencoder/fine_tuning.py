"""Load the base of a fine-tuning (the pretrained network), and record it in the run's folder.

A resume does not need the base's weights: `base.json` holds the base's config, and the checkpoint
holds the weights.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from latentvae.engine.checkpoint_files import newest_usable
from latentvae.errors import UserError
from latentvae.files import read_json
from latentvae.models import FAMILIES, Network, calls, family_of, load_network
from latentvae.models.config_check import check_depth
from latentvae.tasks.autoencoder.config import TrainConfig, parse

BASE_NAME = "base.json"


class _Saved(BaseModel):
    """Content of base.json, which describes the pretrained network."""

    name: str
    hub_id: str | None = None
    encoder_sha256: str
    weights_sha256: str
    whole: bool
    discretised: bool = False
    config: dict[str, Any]


@dataclass(frozen=True)
class Base:
    """The pretrained network that a fine-tuning starts from.

    Args:
        name: the name or path that the user gave.
        net: the network in float32 on the CPU. On resume, the network's weights are random
            until the checkpoint is loaded.
        encoder_sha256: hash of the encoder's weights as they were loaded.
        weights_sha256: hash of all weights as they were loaded.
        whole: whether `net` has the same class as the loaded network. False if a new asymmetric
            decoder replaced the pretrained decoder, if the network got a new quantiser, or if
            diffusers' `VQModel` was converted to latentvae's own class.
        discretised: whether `net` is a loaded KL autoencoder with a new quantiser.
        hub_id: owner/name on the Hub, or None if the network is not from the Hub.
    """

    name: str
    net: Network
    encoder_sha256: str
    weights_sha256: str
    whole: bool
    discretised: bool = False
    hub_id: str | None = None

    def write(self, folder: Path) -> None:
        """Write base.json, the description of this network, into a run's folder."""
        config = {key: value for key, value in self.net.config.items() if key[0] != "_"}
        values = {
            "name": self.name,
            "hub_id": self.hub_id,
            "encoder_sha256": self.encoder_sha256,
            "weights_sha256": self.weights_sha256,
            "whole": self.whole,
            "discretised": self.discretised,
            "config": config,
        }
        temporary = folder / f"{BASE_NAME}.tmp"
        temporary.write_text(json.dumps(values, indent=1))
        temporary.replace(folder / BASE_NAME)


def open_base(config: TrainConfig) -> Base | None:
    """Return the network of the option `pretrained_model_name_or_path`, or None without it.

    A resume takes the weights from the checkpoint, and the network's config from `base.json`.

    Raises:
        UserError: the network cannot be loaded, its architecture or its number of image channels
            is not that of the options, or `base.json` is damaged.
    """
    name, folder = config.model.pretrained_model_name_or_path, config.run.output_dir
    if name is None:
        return None

    # resume: as soon as the run has a checkpoint, it does not need the base's weights
    if folder is not None and not config.run.overwrite_output_dir:
        begun = read_base(Path(folder), config.model.architecture)
        checkpoint = None if begun is None else newest_usable(Path(folder))[0]
        if begun is not None and begun.name == name and checkpoint is not None:
            return begun

    # load the network, and check that its architecture is right
    model = config.model
    single_file = getattr(model, "pretrained_family", None)
    loaded = load_network(name, family=single_file, variant=model.variant)
    family = FAMILIES[model.architecture]
    net = family.adapt(loaded, model.shape())
    if net is None:
        raise UserError(
            f"'{name}' is a {type(loaded).__name__}, but config {config.config} fine-tunes "
            f"{family.network.__name__} networks. Give another config."
        )
    channels = net.config["in_channels"]
    if channels != config.data.image_channels:
        raise UserError(
            f"'{name}' takes {channels}-channel images, but image_channels is "
            f"{config.data.image_channels}. Give --image_channels {channels}, or another "
            "pretrained network."
        )

    # The loaded weights are a memory map of the file. Its alignment can change the rounding of
    # sums, so the weights are copied. A new network is in train mode, so this network is put into
    # train mode too. In train mode, even dropout of probability 0 draws random numbers.
    net = copy.deepcopy(net).train()
    hub_id = None if Path(name).exists() else "/".join(name.split("/")[:2])
    return Base(
        name,
        net,
        encoder_sha256(net),
        weights_sha256(net),
        whole=type(net) is type(loaded),
        discretised=model.has_codes and calls.codes(loaded) is None,
        hub_id=hub_id,
    )


def read_base(folder: Path, architecture: str) -> Base | None:
    """Return the pretrained network that a run's base.json describes, with random weights.

    The result is None if the run's folder has no base.json.

    Raises:
        UserError: base.json is damaged.
    """
    path = folder / BASE_NAME
    if not path.exists():
        return None

    # the recorded config, which may be damaged
    values = read_json(path)
    try:
        saved = _Saved.model_validate(values)
        check_depth(saved.config, path)
        net: Any = FAMILIES[architecture].network.from_config(saved.config)
    except Exception as error:  # a network's class may raise anything for a foreign config
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join(line.strip() for line in lines[:3])
        raise UserError(f"'{path}' is damaged: {reason}") from error

    return Base(
        saved.name,
        net,
        saved.encoder_sha256,
        saved.weights_sha256,
        whole=saved.whole,
        discretised=saved.discretised,
        hub_id=saved.hub_id,
    )


def with_shape_of(config: TrainConfig, base: Base | None) -> TrainConfig:
    """Return checked options with the architecture of the pretrained network, not of the preset.

    If `base` is None, the options stay as they are.
    """
    if base is None:
        return config
    family, values = FAMILIES[config.model.architecture], config.model_dump()
    values["model"] = family.merge_options(values["model"], dict(base.net.config))
    config = parse(values, source="the pretrained network's config")
    family.apply_options(base.net, config.model)
    return config


def encoder_sha256(net: Network) -> str:
    """Return one hash of the names and values of all weights that turn images into latents."""
    return _sha256(family_of(net).latent_side(net))


def weights_sha256(net: Network) -> str:
    """Return one hash of the names and values of all weights of a network."""
    module: Any = net
    return _sha256([module])


def _sha256(parts: Iterable[nn.Module]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for name, value in part.state_dict().items():
            if name.endswith("usage"):  # how often a code was chosen, which changes no latent
                continue
            digest.update(name.encode())
            values = value.detach().cpu().float().contiguous()
            digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
