"""Outputs keep their type and tensors through Accelerate, pytrees and DistributedDataParallel."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.operations import convert_to_fp32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _find_tensors
from torch.utils import _pytree as pytree

from latentvae.outputs import AutoencoderOutput, Latent

TENSORS = ("z", "kl", "kl_per_channel", "mean", "indices", "features")
NAMED = ("losses", "statistics")


def full_latent(value: Tensor) -> Latent:
    """A latent whose every field holds ``value``."""
    named: Any = {name: {"one": value, "two": value} for name in NAMED}
    return Latent(**dict.fromkeys(TENSORS, value), **named)


def tensors_of(latent: Latent) -> list[Tensor]:
    named = [tensor for name in NAMED for tensor in getattr(latent, name).values()]
    return [getattr(latent, name) for name in TENSORS] + named


def test_the_test_knows_every_field_of_a_latent() -> None:
    assert {field.name for field in fields(Latent)} == {*TENSORS, *NAMED}


def test_accelerate_converts_every_tensor_to_float32() -> None:
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    latents = (full_latent(half), full_latent(half))
    out = convert_to_fp32(AutoencoderOutput(recon=half, latents=latents, output_logvar=half))
    assert isinstance(out, AutoencoderOutput) and isinstance(out.latents, tuple)
    assert out.recon.dtype == out["recon"].dtype == out.output_logvar.dtype == torch.float32
    assert len(out.latents) == 2
    for latent in out.latents:
        assert isinstance(latent, Latent) and latent["z"] is latent.z
        assert {tensor.dtype for tensor in tensors_of(latent)} == {torch.float32}


def test_a_latent_of_one_field_is_rebuilt_as_it_was() -> None:
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    out: Any = convert_to_fp32(AutoencoderOutput(recon=half, latents=(Latent(z=half),)))
    (latent,) = out.latents
    assert isinstance(latent, Latent) and latent.z.dtype == torch.float32
    assert latent.kl is None and out.kl is None and out.latent_losses == {}


def test_ddp_finds_every_tensor() -> None:
    values = [torch.full((), float(i)) for i in range(3)]
    latents = (full_latent(values[1]), full_latent(values[2]))
    out = AutoencoderOutput(recon=values[0], latents=latents, output_logvar=values[0])
    found = [int(tensor) for tensor in _find_tensors(out)]
    each = len(TENSORS) + 2 * len(NAMED)
    assert sorted(found) == [0, 0] + [1] * each + [2] * each


def test_a_pytree_holds_every_tensor() -> None:
    """DistributedDataParallel takes outputs apart and puts them together this way."""
    value = torch.ones(2)
    given = AutoencoderOutput(recon=value, latents=(full_latent(value),) * 3, output_logvar=value)
    leaves, spec = pytree.tree_flatten(given)
    assert len(leaves) == 2 + 3 * (len(TENSORS) + 2 * len(NAMED))
    back = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, AutoencoderOutput) and isinstance(back.latents[2], Latent)


def test_kl_and_losses_are_sums_over_the_latents() -> None:
    one = Latent(
        z=torch.zeros(2, 3, 4, 4),
        kl=torch.tensor([1.0, 2.0]),
        kl_per_channel=torch.ones(2, 3),
        losses={"commitment": torch.tensor(0.5), "codebook": torch.tensor(1.0)},
    )
    other = Latent(
        z=torch.zeros(2, 5, 2, 2),
        kl=torch.tensor([10.0, 20.0]),
        losses={"commitment": torch.tensor(0.25)},
    )
    tokens = Latent(z=torch.zeros(2, 8, 2, 2))
    out = AutoencoderOutput(latents=(one, other, tokens))
    assert out.kl is not None and out.kl.tolist() == [11.0, 22.0]
    assert out.kl_elements == 3 * 16 + 5 * 4
    assert {name: value.item() for name, value in out.latent_losses.items()} == {
        "commitment": 0.75,
        "codebook": 1.0,
    }


def test_a_kl_over_tokens_is_a_sum_over_positions() -> None:
    latent = Latent(z=torch.zeros(1, 8, 2, 3), kl=torch.ones(1), kl_per_channel=torch.ones(1, 1))
    assert latent.positions == latent.kl_elements == 6


class Parts(nn.Module):
    """Each tensor of the output has its own parameter; ``idle`` has none."""

    def __init__(self) -> None:
        super().__init__()
        names = ("recon", "z", "kl", "loss", "second_kl")
        self.weights = nn.ParameterDict({name: torch.ones(1) for name in names})
        self.idle = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> AutoencoderOutput:
        w = self.weights
        first = Latent(z=x * w["z"], kl=x * w["kl"], losses={"commitment": (x * w["loss"]).sum()})
        second = Latent(z=x, kl=x * w["second_kl"])
        return AutoencoderOutput(recon=x * w["recon"], latents=(first, second))


def gradients_of_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for way in ("find_unused_parameters", "static_graph"):
        module, options = Parts(), {way: True}
        # A parameter whose tensor DDP does not find counts as unused and is not reduced.
        prepared = DistributedDataParallel(module, **options)
        out = prepared(torch.full((1,), 1.0 + 2.0 * rank))
        total = out.recon.sum() + out.latents[0].z.sum() + out.latent_losses["commitment"]
        (total + out.kl.sum()).backward()
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        save_file(found, folder / f"{way}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_reduces_the_gradient_of_every_tensor(tmp_path: Path) -> None:
    spawn(gradients_of_rank, args=(tmp_path,), nprocs=2)
    for way in ("find_unused_parameters", "static_graph"):
        for rank in (0, 1):
            found = load_file(tmp_path / f"{way}-{rank}.safetensors")
            for name in ("recon", "z", "kl", "loss", "second_kl"):
                assert found[f"weights.{name}"].item() == 2.0, (way, name)  # mean of 1 and 3
