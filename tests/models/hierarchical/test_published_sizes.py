"""The presets of published networks have the published numbers of parameters and groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from latentvae.models.hierarchical.config import HierarchicalConfig
from latentvae.models.hierarchical.network import HierarchicalVAE

CONFIGS = Path(__file__).parents[3] / "train" / "configs"

# Counted with OpenAI's code (github.com/openai/vdvae), which the paper gives as 39, 119 and 125 M.
OPENAI = {
    "vdvae_cifar10": (39_145_700, 43),
    "vdvae_imagenet32": (119_280_868, 78),
    "vdvae_imagenet64": (125_005_860, 75),
}
# Not published. The presets' comments have these numbers.
OWN = {
    "nvae_cifar10": (130_549_120, 30),
    "efficient_vdvae_mnist": (62_024_993, 23),
}


def _net(preset: str) -> HierarchicalVAE:
    options: dict[str, Any] = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text("utf-8"))
    side = options["data"]["resolution"]
    with torch.device("meta"):
        return HierarchicalConfig(**options["vae"]).build(
            (options["data"]["image_channels"], side, side)
        )


@pytest.mark.parametrize("preset", OPENAI | OWN)
def test_a_large_preset_has_its_number_of_parameters(preset: str):
    net = _net(preset)
    found = sum(p.numel() for p in net.parameters()), net.num_groups
    assert found == (OPENAI | OWN)[preset]


@pytest.mark.parametrize("preset", ["hvae_mnist", "hvae_cifar10_small"])
def test_a_small_preset_fits_two_cores(preset: str):
    assert sum(p.numel() for p in _net(preset).parameters()) < 2_000_000
