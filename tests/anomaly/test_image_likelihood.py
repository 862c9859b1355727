"""Images scored by their likelihood under a VAE, with both corrections."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentvae
from latentvae.anomaly.corrections import lossless_bits
from latentvae.anomaly.image_methods import ImageOptions, Likelihood
from latentvae.cli.main import main
from latentvae.data import Batch
from latentvae.engine.loop import train
from latentvae.errors import UserError
from latentvae.models.dense.network import VectorVAE
from latentvae.models.likelihood_models import ImagesOfModel, write_images_file
from latentvae.tasks.likelihood.images import perturbed
from latentvae.tasks.likelihood.task import LikelihoodTask
from tests import tiny
from tests.tasks.likelihood.small import small_likelihood, write_bars

SIDE = 8
pytestmark = pytest.mark.usefixtures("own_accelerate")


def write_vae(folder: Path, *, scale: float, side: int = SIDE) -> Path:
    """Save a VAE of grey images that predicts mid-grey with the given scale of its pixels."""
    torch.manual_seed(0)
    shape = {"image_channels": 1, "image_height": side, "image_width": side}
    size = {"latent_units": (2,), "hidden_channels": (8,)}
    net = VectorVAE(**shape, **size, likelihood="discretized_logistic")
    with torch.no_grad():
        net.decoder.last.weight.mul_(0.01)
        location, log_scale = net.decoder.last.bias.view(2, side, side)
        location.zero_()
        log_scale.fill_(math.log(scale))
    net.save_pretrained(folder)
    write_images_file(folder, ImagesOfModel())
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("models") / "vae", scale=0.1)


@pytest.fixture(scope="module")
def background(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("models") / "background", scale=0.5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean images of grey noise, and test images of which some have a bright corner."""
    folder, draws = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for name, count in (("clean", 40), ("test/good", 5), ("test/scratch", 5)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = draws.integers(110, 146, (SIDE, SIDE)).astype(np.uint8)
            if name.endswith("scratch"):
                pixels[:3, :3] = 255
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def some_images() -> torch.Tensor:
    levels = torch.randint(0, 256, (3, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1.0


@pytest.mark.parametrize("correction", ["none", "complexity", "ratio"])
def test_unlikely_images_are_found(
    correction: str, model: Path, background: Path, parts: Path, tmp_path: Path
) -> None:
    other = ["--background", str(background)] if correction == "ratio" else []
    options = ["--method", "likelihood", "--correction", correction, *other]
    command = ["anomaly", "fit", "--data", str(parts / "clean"), "--model", str(model)]
    main([*command, *options, "--false_alarm_rate", "0.2", "--out", str(tmp_path / "d")])
    assert json.loads((tmp_path / "d" / "anomaly.json").read_text())["resolution"] == SIDE

    for name in ("one", "two"):
        command = ["anomaly", "score", str(tmp_path / "d"), "--data", str(parts / "test")]
        report = ["--json", str(tmp_path / f"{name}.json")]
        main([*command, "--out", str(tmp_path / name), "--labels", "good", *report])
    summary = json.loads((tmp_path / "one.json").read_text())
    assert summary["auroc"] == 1 and summary == json.loads((tmp_path / "two.json").read_text())
    first, second = ((tmp_path / name / "scores.csv").read_text() for name in ("one", "two"))
    assert first == second


def test_scores_are_corrected_bounds_in_nats(model: Path, background: Path) -> None:
    images, network = some_images(), latentvae.load(model)
    plain = Likelihood(ImageOptions(samples=200)).score(network, images)
    with torch.no_grad():
        expected = -network.net(images, samples=2000).importance()
    assert plain.scores.numpy() == pytest.approx(expected.numpy(), rel=1e-3)
    assert plain.maps.shape == (3, SIDE, SIDE)

    complexity = Likelihood(ImageOptions(samples=200, correction="complexity"))
    difference = plain.scores - complexity.score(network, images).scores
    assert difference.numpy() == pytest.approx(lossless_bits(images) * math.log(2))

    both = ImageOptions(samples=200, correction="ratio", background=str(background))
    own = Likelihood(ImageOptions(samples=200)).score(latentvae.load(background), images).scores
    ratio = Likelihood(both).score(network, images).scores
    assert (plain.scores - ratio).numpy() == pytest.approx(own.numpy())


def test_the_score_of_an_image_does_not_depend_on_its_batch(model: Path) -> None:
    images, network = some_images(), latentvae.load(model)
    method, state = Likelihood(ImageOptions(samples=1)), torch.random.get_rng_state()
    together = method.score(network, images).scores
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = [method.score(network, image[None]).scores for image in images]
    assert torch.equal(torch.cat(alone), together)


def test_wrong_models_are_one_sentence(model: Path, tmp_path: Path) -> None:
    tiny.tiny().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no likelihood"):
        Likelihood(ImageOptions()).score(latentvae.load(tmp_path), tiny.photos(1, 32))
    with pytest.raises(UserError, match="Give both or none"):
        Likelihood(ImageOptions(correction="ratio"))
    with pytest.raises(UserError, match="Give both or none"):
        Likelihood(ImageOptions(background=str(model)))
    small = write_vae(tmp_path / "small", scale=0.1, side=4)
    options = ImageOptions(correction="ratio", background=str(small))
    with pytest.raises(UserError, match="has another likelihood, binary images or image size"):
        Likelihood(options).score(latentvae.load(model), some_images())
    fitted = Likelihood(ImageOptions(correction="ratio", background=str(model)))
    other = Likelihood(options)
    with pytest.raises(UserError, match="has other weights than when the detector was"):
        other.restore(fitted.tensors())
    with pytest.raises(UserError, match="samples must be at least 1"):
        Likelihood(ImageOptions(samples=0))


@pytest.mark.parametrize("binarize", ["none", "dynamic", "static", "threshold"])
def test_perturbed_images_have_the_values_of_the_likelihood(binarize: str, tmp_path: Path) -> None:
    bars = write_bars(tmp_path / "bars", count=20)
    data = {"binarize": binarize, "perturb_rate": 0.5}
    vae = {"likelihood": "bernoulli" if binarize != "none" else "discretized_logistic"}
    config = small_likelihood(bars, tmp_path / "run", vae=vae, data=data, max_train_steps=1)
    task = LikelihoodTask(config)
    train(task)
    images = task.prepared_images(Batch(task.pixels[:8], torch.arange(8), []))
    levels = ((images + 1.0) * 127.5).round() / 127.5 - 1.0
    torch.testing.assert_close(levels, images)
    assert (images.abs() == 1.0).all() == (binarize != "none")
    plain = task.pixels[:8] / 127.5 - 1.0
    assert (images.sign() != plain.sign()).float().mean() > 0.1


def test_perturbed_changes_the_given_share_of_values() -> None:
    images = some_images().expand(3, 40, SIDE, SIDE)
    changed = perturbed(images, rate=0.2)
    assert (changed != images).float().mean().item() == pytest.approx(0.2 * 255 / 256, abs=0.02)
    assert changed.aminmax().min >= -1 and changed.aminmax().max <= 1
    assert torch.equal(perturbed(images, rate=0.0), images)
