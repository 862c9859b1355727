import pytest

from latentvae.config.autoencoder import TrainConfig
from latentvae.config.presets import parse
from latentvae.tasks.autoencoder.schedule import adversarial_factor, learning_rate


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


def test_the_critic_learns_before_it_is_obeyed() -> None:
    critic = config(critic={"disc_scale": 0.5, "disc_ramp_steps": 4}).critic
    factors = [adversarial_factor(u, start=3, critic=critic) for u in range(9)]
    assert factors == [None, None, None, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert (
        adversarial_factor(9, start=3, critic=critic.model_copy(update={"disc_scale": 0.0})) is None
    )


def test_disc_start_is_a_share_of_the_run_below_one_and_an_update_above() -> None:
    assert config(critic={"disc_start": 0.25}, run={"max_train_steps": 1000}).critic_start == 250
    assert config(critic={"disc_start": 50_000}).critic_start == 50_000
    assert config(critic={"disc_start": 0}).critic_start == 0
