"""Settings of the launcher that training does not support are refused with their origin."""

import subprocess
import sys
from pathlib import Path

import pytest

from latentvae.engine import launcher
from latentvae.engine.launcher import check_launcher
from latentvae.errors import UserError


@pytest.mark.parametrize(
    ("variable", "value", "text", "said"),
    [
        (
            "DYNAMO_BACKEND",
            "INDUCTOR",
            "dynamo_config: {dynamo_backend: INDUCTOR}",
            "dynamo_backend inductor",
        ),
        ("USE_DEEPSPEED", "true", "deepspeed_config: {zero_stage: 2}", "DeepSpeed"),
        ("USE_FSDP", "true", "fsdp_config: {fsdp_version: 2}", "FSDP"),
        ("MIXED_PRECISION", "fp8", "mixed_precision: fp8", "mixed_precision fp8"),
        ("MIXED_PRECISION", "fp16", "mixed_precision: fp16", "mixed_precision fp16"),
    ],
)
def test_a_setting_is_refused_with_the_file_it_came_from(
    variable: str, value: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "default_config.yaml"
    file.write_text(text)
    monkeypatch.setattr(launcher, "default_config_file", str(file))
    with pytest.raises(UserError, match=said) as error:
        check_launcher(precision=None, environment={f"ACCELERATE_{variable}": value})
    assert f"in '{file}'" in str(error.value)

    file.unlink()
    with pytest.raises(UserError, match="from its command line or the environment"):
        check_launcher(precision=None, environment={f"ACCELERATE_{variable}": value})


def test_what_training_supports_passes() -> None:
    usual = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "bf16"}
    check_launcher(precision=None, environment=usual)
    check_launcher(precision="bf16", environment={"ACCELERATE_MIXED_PRECISION": "fp8"})


@pytest.mark.slow
def test_the_file_of_a_real_launch_is_named(tmp_path: Path) -> None:
    file = tmp_path / "other project.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\n"
        "num_machines: 1\nmixed_precision: 'no'\nuse_cpu: true\n"
        "dynamo_config:\n  dynamo_backend: INDUCTOR\n"
    )
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    script = Path(__file__).parents[2] / "train" / "train_kl.py"
    trained = [str(script), "--train_data_dir", "samples", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([*launched, *trained], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert f"asks for dynamo_backend inductor (dynamo_backend in '{file}')" in done.stderr
