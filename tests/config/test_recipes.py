"""`--recipe`: the defaults that it sets, and that flags override."""

import pytest

from latentvae.cli.train import config_from_arguments
from latentvae.config.presets import preset_names
from latentvae.config.recipes import RECIPES, with_recipe
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import TrainConfig, load_preset

SMALL = ("kl_small", "kl_small_d16", "vq_small", "vit_vq_small", "vqvae2_small")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--config", "kl_small"], ("auto", "muon")),
        (["--config", "kl_small", "--recipe", "published"], ("random", "adamw")),
        (["--config", "kl_f8"], ("random", "adamw")),
        (["--recipe=fast", "--config", "kl_f8"], ("auto", "muon")),
        (["--config", "kl_f8", "--recipe", "fast", "--init", "random"], ("random", "muon")),
        (["--config", "dc_f32", "--recipe", "fast"], (None, "muon")),
    ],
)
def test_a_recipe_sets_defaults_and_flags_override_it(
    flags: list[str], found: tuple[str | None, str]
) -> None:
    chosen = config_from_arguments(flags, description="")
    assert (getattr(chosen.model, "init", None), chosen.optimizer.optimizer) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--recipe", "fats"],
            "recipe must be published or fast .got 'fats'.; did you mean 'fast'",
        ),
        (["--recipe"], "recipe must be published or fast"),
        (["--recip", "fast"], "did you mean '--recipe'"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_arguments(flags, description="")


def test_the_small_presets_are_fast_and_the_others_published() -> None:
    for name in preset_names(TrainConfig):
        preset = load_preset(name)
        assert with_recipe(preset, "fast" if name in SMALL else "published") == preset
        assert all(with_recipe(preset, recipe).config == name for recipe in RECIPES)
