"""Preflight: all checks hold on a sound trainer, and each fault fails its own check alone."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from latentvae.cli.main import main
from latentvae.proofs.preflight import preflight, resources
from latentvae.tasks.autoencoder.config import TrainConfig
from tests.forks import ended_ranks
from tests.launch import ROOT, finish, launch, train_flags
from tests.proofs.mutations import ELSEWHERE, MUTATIONS, Mutation, applied
from tests.tasks.autoencoder.small import as_flags, small_config

pytestmark = pytest.mark.usefixtures("own_accelerate")

# A few of each kind are tried in every run of the tests.
QUICK = (
    "LPIPS without gradient",
    "the discriminator takes gradients from the model's part",
    "a KL averaged over latent elements",
    "an average that is never stepped",
    "an optimiser that is not restored",
    "a model that waits for the discriminator until the run ends",
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    folder = tmp_path_factory.mktemp("pretrained") / "vae"
    net.save_pretrained(folder)
    return folder


def config_of(mutation: Mutation | None, folder: Path, pretrained: Path) -> TrainConfig:
    if mutation is None:
        return small_config(folder / "run", train_batch_size=2)
    options: dict[str, Any] = {"train_batch_size": 2, **mutation.config}
    if mutation.fine_tuned:
        options["pretrained_model_name_or_path"] = str(pretrained)
        options["freeze_encoder"] = True
    return small_config(folder / "run", mutation.model, **options)


def checks_of(config: TrainConfig, file: Path) -> dict[str, dict[str, Any]]:
    """The checks of a preflight by name, with its exit code tested."""
    code = preflight(config, json=file)
    checks = read(file)
    assert code == (1 if failed(checks) else 0)
    return checks


def read(file: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(file.read_text())["checks"]}


def failed(checks: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    return tuple(name for name, check in checks.items() if not check["passed"])


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(
            mutation, id=mutation.name, marks=[] if mutation.name in QUICK else pytest.mark.slow
        )
        for mutation in MUTATIONS
        if mutation.processes == 1
    ],
)
def test_each_fault_fails_its_own_check(
    mutation: Mutation, tmp_path: Path, pretrained: Path
) -> None:
    config = config_of(mutation, tmp_path, pretrained)
    with applied(mutation):
        checks = checks_of(config, tmp_path / "checks.json")
    assert failed(checks) == mutation.fails, {n: checks[n] for n in failed(checks)}
    assert (mutation.why != "") == (len(mutation.fails) > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation",
    [
        None,
        *(
            pytest.param(mutation, id=mutation.name)
            for mutation in MUTATIONS
            if mutation.processes > 1
        ),
    ],
)
def test_each_fault_of_two_processes_fails_its_own_check(
    mutation: Mutation | None, tmp_path: Path
) -> None:
    model = None if mutation is None else mutation.model
    config = small_config(tmp_path / "run", model, train_batch_size=2)
    file = tmp_path / "checks.json"

    def checked() -> None:
        with contextlib.nullcontext() if mutation is None else applied(mutation):
            raise SystemExit(preflight(config, json=file))

    codes, text = ended_ranks(checked, output=tmp_path / "output.txt")
    checks = read(file)
    assert {"ranks-equal", "ranks-batches"} <= checks.keys(), text
    assert failed(checks) == (() if mutation is None else mutation.fails), text
    assert codes == [0 if mutation is None else 1] * 2, text


@pytest.mark.parametrize("kind", ["continuous", "tokens"])
def test_a_sound_run_passes_and_leaves_its_folder_alone(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder holds a run that has begun: it is neither read nor touched."""
    from tests.proofs.mutations import LEARNED_CODES

    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "config.yaml").write_text("model: {}\n")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    model = LEARNED_CODES if kind == "tokens" else None
    config = small_config(run, model, train_batch_size=2)
    untouched = config.model_copy(deep=True)
    checks = checks_of(config, tmp_path / "checks.json")
    assert not failed(checks) and config == untouched
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    lines = capsys.readouterr().out.splitlines()
    told = [line.split()[1].rstrip(":") for line in lines if line.startswith("ok ")]
    assert told == list(checks)
    assert ("commitment" in checks) == (kind == "tokens") == ("kl" not in checks)


def test_the_code_that_each_mutation_breaks_is_there() -> None:
    for mutation in MUTATIONS:
        with applied(mutation):
            pass


def test_every_check_but_the_forecasts_is_failed_by_a_mutation() -> None:
    """Those have tests of their own, below."""
    names = {name for mutation in MUTATIONS for name in mutation.fails}
    everywhere = {"updates", "weights", "optimizer", "cleared", "learning-rate"}
    everywhere |= {"precision", "average"}
    discriminator = {
        "discriminator-start",
        "discriminator-ramp",
        "discriminator-untouched",
        "model-untouched",
    }
    discriminator |= {"adaptive-weight", "discriminator-separates"}
    terms = {"lpips-gradient", "latent-gradient", "reconstruction", "kl", "kl-gradient"}
    terms |= {"commitment", "codebook", "accumulation"}
    others = {"frozen", "lpips-weights", "image-range", "validation", "checkpoint"}
    others |= {"model-learns", "rate-in-run", "discriminator-in-run", "kl-in-run"}
    assert names == everywhere | discriminator | terms | others | {"ranks-equal", "ranks-batches"}


def test_every_known_fault_has_a_mutation_or_a_reason() -> None:
    known = {
        f"{group}{i}" for group, n in (("A", 11), ("V", 12), ("T", 8)) for i in range(1, n + 1)
    }
    mutated = {mutation.fault for mutation in MUTATIONS} - {""}
    assert mutated | set(ELSEWHERE) == known
    assert not mutated & set(ELSEWHERE)
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_disk_that_is_too_small_and_a_memory_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 10**5))
    monkeypatch.setattr(resources, "FULL", 1e-6)
    checks = checks_of(small_config(tmp_path, train_batch_size=2), tmp_path / "checks.json")
    assert failed(checks) == ("memory", "disk")
    assert "checkpoints_total_limit" in checks["disk"]["advice"]


def test_where_memory_runs_out_the_batch_to_try_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("latentvae.engine.updates.Updates.make", out)
    checks = checks_of(small_config(tmp_path, train_batch_size=6), tmp_path / "checks.json")
    assert failed(checks) == tuple(checks) == ("updates",)
    assert "--train_batch_size 3" in checks["updates"]["advice"]


def test_the_command_takes_the_flags_of_the_training_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = as_flags(small_config(tmp_path / "run", disc_scale=0.0, perceptual_scale=0.0))
    with pytest.raises(SystemExit) as end:
        main(["preflight", "kl_small", *flags, "--json", str(tmp_path / "checks.json")])
    assert end.value.code == 0 and not failed(read(tmp_path / "checks.json"))
    for wrong, said in (
        (["preflight"], "preset, or a YAML file"),
        (["preflight", "kl_smal"], "did you mean 'kl_small'"),
        (["preflight", "kl_small", "--jso", "x"], "did you mean '--json'"),
        (["preflight", "kl_small", "--learning_rat", "1"], "did you mean '--learning_rate'"),
        (["preflight", "kl_small", "--train_data_dir", str(tmp_path / "no")], str(tmp_path / "no")),
        (["preflight", "kl_small", "--json", str(tmp_path / "no" / "x")], "json"),
    ):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_the_training_script_checks_and_exits(tmp_path: Path) -> None:
    flags = train_flags(tmp_path / "run", train_batch_size=2)
    text = finish(launch([*flags, "--preflight"], processes=2))
    assert text.count("ok     checkpoint:") == 1 and "checks hold" in text
    assert "ok     ranks-equal:" in text
    assert not (tmp_path / "run").exists()


def test_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "latentvae.cli", "preflight", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "--json" in done.stdout
