"""Runs that start at the linear code and learn by Muon."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import linear_start, train
from tests.faults.kills import assert_same
from tests.forks import ranks
from tests.tasks.autoencoder.small import broken_off, small_config

WIDE: dict[str, Any] = {
    "block_out_channels": [16, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "init": "linear",
}
CODES = {"type": "vq", "num_codes": 32, "code_channels": 4, "kmeans_iterations": 2}
MODELS = {
    "kl": {"initial_posterior_logvar": -6.0, **WIDE},
    "vq": {"architecture": "vq", "latent_channels": 8, "quantizer": CODES, **WIDE},
}


def config(folder: Path, name: str = "kl", **changes: Any) -> Any:
    own = {"optimizer": "muon", "muon_learning_rate": 2e-3, "learn_logvar": False} | changes
    return small_config(folder, model=MODELS[name], **own)


@pytest.fixture(autouse=True, scope="module")
def _few_images() -> Iterator[None]:
    """The start takes 32 crops, which saves seconds of decoding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_start, "FEWEST", 32)
        patch.setattr(linear_start, "MOST", 32)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config(folder))
    return folder


def test_a_stopped_run_goes_on_to_the_bit(whole: Path, tmp_path: Path) -> None:
    optimizer = load_file(whole / "checkpoint-6" / "model_optimizer.safetensors")
    conv = "net.encoder.mid_block.resnets.0.conv1.weight"
    assert f"{conv}|exp_avg" in optimizer and f"{conv}|exp_avg_sq" not in optimizer
    assert "net.encoder.conv_in.weight|exp_avg_sq" in optimizer
    broken = broken_off(whole, tmp_path / "broken", update=2)
    train(config(broken))
    assert_same(whole, broken, update=6)


@pytest.mark.slow
def test_a_stopped_tokenizer_goes_on_to_the_bit(tmp_path: Path) -> None:
    train(config(tmp_path / "whole", "vq"))
    broken = broken_off(tmp_path / "whole", tmp_path / "broken", update=2)
    train(config(broken, "vq"))
    assert_same(tmp_path / "whole", broken, update=6)


def test_the_first_validation_is_better_than_a_random_start_after_training(
    whole: Path, tmp_path: Path
) -> None:
    random = {**MODELS["kl"], "init": "random"}
    train(small_config(tmp_path, model=random, learn_logvar=False))
    linear_psnr, random_psnr = (
        [row["validation/psnr"] for row in read_rows(run / "log.jsonl") if "validation/psnr" in row]
        for run in (whole, tmp_path)
    )
    assert linear_psnr[0] > random_psnr[-1] + 3


@pytest.mark.slow
def test_two_ranks_start_equal(tmp_path: Path) -> None:
    one = tmp_path / "one"
    train(config(one, max_train_steps=1))
    changes = {"max_train_steps": 1, "train_batch_size": 2}
    ranks(lambda: train(config(tmp_path / "two", **changes)), output=tmp_path / "output.txt")
    psnr = [read_rows(tmp_path / n / "log.jsonl")[0]["validation/psnr"] for n in ("one", "two")]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.5)  # batches, and so the first images, differ


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"pretrained_model_name_or_path": "somewhere"}, "init linear is for new networks"),
        ({"init": "zero"}, "init is 'zero', but should be 'random', 'linear' or 'auto'"),
        (
            {"architecture": "vq", "quantizer": {"type": "gumbel"}},
            r"init linear does not work with vq \(gumbel\): its features are logits",
        ),
        (
            {"architecture": "vq", "quantizer": {"type": "vq", "kmeans_iterations": 0}},
            r"its codes are random\. Give --kmeans_iterations 10",
        ),
        ({"block_out_channels": [16]}, "init linear needs at least 2 levels"),
        (
            {"architecture": "vq", "likelihood": "logit_laplace"},
            "init linear needs a decoder of images",
        ),
    ],
)
def test_what_has_no_linear_start_is_refused(
    model: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        small_config(tmp_path, model=WIDE | model)


def test_small_groups_end_the_run_before_it_writes(tmp_path: Path) -> None:
    model = {**WIDE, "block_out_channels": [8, 8, 16]}
    with pytest.raises(UserError, match="at least 4 channels for each group"):
        train(small_config(tmp_path / "run", model=model, learn_logvar=False))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("model", "linear"),
    [
        ({}, True),
        ({"norm_num_groups": 8}, False),  # 2 channels for each group
        ({"block_out_channels": [16]}, False),
        ({"pretrained_model_name_or_path": "somewhere"}, False),
        ({"architecture": "vq", "quantizer": {"type": "gumbel"}}, False),
        ({"init": "random"}, False),
    ],
)
def test_auto_starts_linear_where_it_can(
    model: dict[str, Any], linear: bool, tmp_path: Path
) -> None:
    own = WIDE | {"init": "auto"} | model
    assert small_config(tmp_path, model=own).starts_linear is linear
