import pytest

from latentvae.engine.schedule import learning_rate
from latentvae.tasks.autoencoder.config import TrainConfig, parse


def config(**sections: dict[str, object]) -> TrainConfig:
    return parse({name: dict(options) for name, options in sections.items()}, source="test")


def test_warm_up_then_cosine_to_zero() -> None:
    c = config(
        optimizer={"lr_scheduler": "cosine", "lr_warmup_steps": 10}, run={"max_train_steps": 110}
    )
    rates = [learning_rate(u, peak=1.0, config=c) for u in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0.0, abs=1e-12)


def test_constant_after_the_warm_up() -> None:
    c = config(optimizer={"lr_warmup_steps": 2}, run={"max_train_steps": 5})
    assert [learning_rate(u, peak=2.0, config=c) for u in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_disc_start_is_a_share_of_the_run_below_one_and_an_update_above() -> None:
    assert (
        config(
            discriminator={"disc_start": 0.25}, run={"max_train_steps": 1000}
        ).discriminator_start
        == 250
    )
    assert config(discriminator={"disc_start": 50_000}).discriminator_start == 50_000
    assert config(discriminator={"disc_start": 0}).discriminator_start == 0


def rates(pause: range, *, warmup: int, total: int = 110, scheduler: str = "cosine") -> list[float]:
    c = config(
        optimizer={"lr_scheduler": scheduler, "lr_warmup_steps": warmup},
        run={"max_train_steps": total},
    )
    return [learning_rate(u, peak=1.0, config=c, pause=pause) for u in range(total + 1)]


def test_the_warm_up_waits_for_a_model_that_stands_still() -> None:
    late = rates(range(50), warmup=10)
    assert late[50:60] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert late[60] == 1.0 and late[85] == pytest.approx(0.5) and late[110] == pytest.approx(0.0)


def test_a_pause_within_the_warm_up_is_not_counted() -> None:
    found = rates(range(5, 25), warmup=10)
    assert found[:5] + found[25:30] == pytest.approx([0.1 * step for step in range(1, 11)])


def test_a_pause_after_the_warm_up_changes_nothing() -> None:
    assert rates(range(10, 30), warmup=10) == rates(range(0), warmup=10)
