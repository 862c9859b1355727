"""The global batch: what a process takes at once, and how often, for any number of processes."""

from pathlib import Path

import pytest

from latentvae.cli.train import config_from_arguments
from latentvae.config.update_batch import split_batch
from latentvae.errors import UserError
from latentvae.tasks.autoencoder.config import TrainConfig, parse


def config(crops: int = 1, **run: int) -> TrainConfig:
    return parse({"run": run, "data": {"crops_per_image": crops}}, source="test")


@pytest.mark.parametrize(
    ("total", "most", "processes", "expected"),
    [
        (128, 16, 1, (16, 8)),
        (128, 16, 8, (16, 1)),
        (128, 16, 16, (8, 1)),
        (12, 5, 1, (4, 3)),
        (7, 6, 1, (1, 7)),
        (12, 100, 3, (4, 1)),
    ],
)
def test_micro_steps_follow_from_the_processes(
    total: int, most: int, processes: int, expected: tuple[int, int]
) -> None:
    options = config(global_batch_size=total, train_batch_size=most)
    batch = split_batch(options.run, processes)
    assert batch == expected and batch.per_process * batch.micro_steps * processes == total

    run = options.for_processes(processes).run
    assert (run.train_batch_size, run.gradient_accumulation_steps) == expected
    assert options.for_processes(processes).for_processes(processes).run == run


def test_without_a_global_batch_nothing_follows() -> None:
    run = config(train_batch_size=5).for_processes(3).run
    assert (run.train_batch_size, run.gradient_accumulation_steps) == (5, 1)


def test_crops_of_an_image_stay_in_one_micro_step() -> None:
    assert split_batch(config(3, global_batch_size=36, train_batch_size=8).run, 2, multiple=3) == (
        6,
        3,
    )


@pytest.mark.parametrize(
    ("options", "crops", "processes", "message"),
    [
        ({"global_batch_size": 10}, 1, 4, "10 is not a multiple of the 4 processes. .* is 8."),
        ({"global_batch_size": 2}, 1, 4, "nearest multiple is 4."),
        ({"global_batch_size": 9}, 2, 1, "times crops_per_image 2. The nearest multiple is 8."),
        (
            {"global_batch_size": 128, "train_batch_size": 16, "gradient_accumulation_steps": 2},
            1,
            1,
            "Allowed are 8, 16, 32, 64, 128. Leave .* out .* or give --global_batch_size 32.",
        ),
    ],
)
def test_what_cannot_be_shared_names_the_nearest(
    options: dict[str, int], crops: int, processes: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config(crops, **options).for_processes(processes)


def test_warm_ups_may_be_a_share_of_the_run() -> None:
    shares = parse(
        {
            "optimizer": {"lr_warmup_steps": 0.1},
            "discriminator": {"disc_warmup_steps": 0.25, "disc_ramp_steps": 0.5},
            "objective": {"kl_warmup_steps": 0.01, "kl_capacity_steps": 0},
            "run": {"max_train_steps": 200},
        },
        source="test",
    )
    found = (
        shares.optimizer.lr_warmup_steps,
        shares.discriminator.disc_warmup_steps,
        shares.discriminator.disc_ramp_steps,
        shares.objective.kl_warmup_steps,
    )
    assert found == (20, 50, 100, 2) and all(isinstance(value, int) for value in found)
    with pytest.raises(
        UserError, match=r"lr_warmup_steps is 2.5, but should .* The nearest whole number is 2\."
    ):
        parse({"optimizer": {"lr_warmup_steps": 2.5}}, source="test")
    assert shares.model_dump(mode="json")["optimizer"]["lr_warmup_steps"] == 20


def test_a_share_in_a_file_follows_the_command_lines_length(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("optimizer: {lr_warmup_steps: 0.1}\nrun: {max_train_steps: 100000}\n")
    flags = ["--config", str(file), "--train_data_dir", "photos", "--output_dir", "run"]
    for given, steps in (([], 10_000), (["--max_train_steps", "1000"], 100)):
        assert config_from_arguments(
            [*flags, *given], description=""
        ).optimizer.lr_warmup_steps == (steps)
