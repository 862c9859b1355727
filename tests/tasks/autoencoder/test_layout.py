"""Memory layout and compilation: the same curve, exact resumes, exports of stock networks."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel

from latentvae.compute.compilation import compile_blocks, not_compiled
from latentvae.engine.log import read_rows
from latentvae.engine.weight_average import WeightAverage
from latentvae.errors import UserError
from latentvae.models import FAMILIES
from latentvae.tasks.autoencoder import build_parts
from latentvae.tasks.autoencoder.refusals import check_compilation
from tests.tasks.autoencoder.recording import recorded
from tests.tasks.autoencoder.small import broken_off, small_config
from tests.tasks.autoencoder.test_resume import assert_same_run, run_to_the_end

OPTIONS: dict[str, Any] = {  # few blocks, for a compiler that takes ten seconds for each
    "learning_rate": 2e-4,  # see test_golden.py
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor calls g++")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layout") / "plain"
    run_to_the_end(folder, **OPTIONS)
    return folder


def assert_same_curve(plain: Path, other: Path) -> None:
    left, right = (
        [row for row in read_rows(folder / "log.jsonl") if "loss/rec" in row]
        for folder in (plain, other)
    )
    assert len(left) == len(right) == 3
    for expected, found in zip(left, right, strict=True):
        for name in (
            "loss/rec",
            "loss/lpips",
            "latent/kl_nats",
            "discriminator/loss",
            "grad/model",
        ):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_channels_last(plain: Path, tmp_path: Path) -> None:
    options = {"channels_last": True, **OPTIONS}
    with recorded() as recording:
        run_to_the_end(tmp_path / "straight", **options)
    for learner in recording.training.task.learners.values():
        module, state = learner.module, learner.optimizer.state
        kernels = [p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
        moments = [state[p]["exp_avg"] for p in kernels if p in state]
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in moments)
    broken_off(tmp_path / "straight", tmp_path / "resumed", update=2)
    run_to_the_end(tmp_path / "resumed", **options)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    assert_same_curve(plain, tmp_path / "straight")


@pytest.mark.slow
def test_compiled_by_aot_autograd(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of torch.compile but the code generator: `test_compiled_by_inductor` has it."""
    torch.compiler.reset()
    counts: list[int] = []

    def compiling(net: Any) -> None:
        counts.append(compile_blocks(net, backend="aot_eager"))

    monkeypatch.setattr(build_parts, "compile_blocks", compiling)
    options = {"torch_compile": True, **OPTIONS}
    run_to_the_end(tmp_path / "straight", **options)
    broken_off(tmp_path / "straight", tmp_path / "resumed", update=2)
    run_to_the_end(tmp_path / "resumed", **options)
    assert counts == [6, 6]  # two blocks down, two up, two in the middle
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    assert_same_curve(plain, tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_compiler
def test_compiled_by_inductor(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    options = {"torch_compile": True, **OPTIONS}
    run_to_the_end(tmp_path / "straight", **options)
    torch.compiler.reset()
    broken_off(tmp_path / "straight", tmp_path / "resumed", update=2)
    run_to_the_end(tmp_path / "resumed", **options)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    assert_same_curve(plain, tmp_path / "straight")


def test_several_processes_are_not_compiled(tmp_path: Path) -> None:
    config = small_config(tmp_path, torch_compile=True)
    check_compilation(config, processes=1)
    with pytest.raises(UserError, match="with one process only, and 2 were started"):
        check_compilation(config, processes=2)


def test_channels_last_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch_compile and channels_last exclude each other"):
        small_config(tmp_path, torch_compile=True, channels_last=True)


@pytest.mark.slow
def test_blocks_are_called_as_they_are_inside_not_compiled() -> None:
    torch.compiler.reset()
    calls: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return graph.forward

    net = FAMILIES["kl"].build(block_out_channels=(8, 8), norm_num_groups=4)
    assert compile_blocks(net, backend=partial(counting)) == 6  # type: ignore[arg-type]
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad(), not_compiled():
        expected = net(images).sample
    assert not calls
    with torch.no_grad():
        found = net(images).sample
    assert calls
    torch.testing.assert_close(found, expected)
    assert not any("_orig_mod" in name for name in net.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing": True}, "exclude each other"),
        ({"aspect_ratio_buckets": 3}, "aspect_ratio_buckets 3"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, torch_compile=True, **options)


def test_the_average_is_that_of_diffusers() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    parameters[1].requires_grad_(False)
    ours, theirs = (kind(parameters, decay=0.9) for kind in (WeightAverage, EMAModel))
    for _ in range(30):
        with torch.no_grad():
            parameters[0].add_(torch.randn(3, 4))
        ours.step(parameters)
        theirs.step(parameters)
        assert (ours.optimization_step, ours.cur_decay_value) == (
            theirs.optimization_step,
            theirs.cur_decay_value,
        )
        torch.testing.assert_close(ours.shadow_params, theirs.shadow_params)
    assert torch.equal(ours.shadow_params[1], parameters[1])  # a frozen one is itself
