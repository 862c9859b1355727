"""Compare our VAE and IWAE with those of the package pythae: bound and time of an update.

    pip install --no-deps --target peers pythae==0.1.2
    PYTHONPATH=peers python benchmarks/vae_peers.py --data mnist/train.parquet --json out.json

Both packages train the dense network 784-200-200-50 of the IWAE paper (arXiv:1509.00519) by Adam,
on the same images.

- The script copies our weights into pythae's network, and compares the mean likelihood bounds of
  both packages for the same images. Each mean has a standard error, because the two packages draw
  different latents. For the IWAE, pythae reports the mean of ln w weighted by w, where w is the
  importance weight of a sample. The script compares this weighted mean, which is above the
  importance-weighted bound.
- The script times updates of both packages alternately, in rounds. The script reports the median,
  minimum and maximum ratio of pythae's time to our time. An update is a forward pass, a backward
  pass and a step of Adam. The time to make the batch does not count.
"""

import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.cli.flags import exit_with, parse_options
from latentvae.data import BadImages, EvalTransform, PixelFormat, open_source, some_of
from latentvae.errors import UserError
from latentvae.losses.variational import VariationalConfig, VariationalLoss
from latentvae.models.dense.network import VectorVAE
from latentvae.tasks.likelihood.images import binary, read_all


@dataclass(frozen=True)
class Options:
    """Options: on which images to measure, and how often."""

    data: str
    """Images of digits, in any form that --train_data_dir of `latentvae train-vae` takes."""

    json: Path
    """JSON file for the results."""

    samples: int = 50
    """Number of latent samples for each image, in the IWAE (importance-weighted autoencoder)."""

    batch_size: int = 100
    """Number of images in an update."""

    rounds: int = 9
    """Number of rounds. In each round, this package and pythae make the same number of updates."""

    updates: int = 5
    """Number of updates that each of the two packages makes in a round."""

    repeats: int = 40
    """Number of estimates of the likelihood bound, for the comparison of the two packages."""

    def run(self) -> None:
        """Measure both packages, print a table of the results, and write them to the JSON file."""
        models = import_peer()
        images = self._images()
        rows = [self._compare(models, images, samples) for samples in (1, self.samples)]
        for row in rows:
            print(
                f"{row['name']}: bound ours {row['ours']:.3f} ± {row['ours_error']:.3f}, pythae "
                f"{row['theirs']:.3f} ± {row['theirs_error']:.3f} nats; an update of pythae takes "
                f"{row['ratio']:.2f} times as long as ours "
                f"({row['least']:.2f} to {row['most']:.2f})"
            )
        self.json.write_text(json.dumps({"options": str(self), "rows": rows}, indent=1) + "\n")

    def _images(self) -> Tensor:
        source = some_of(open_source(self.data, pixels=PixelFormat(1)), self.batch_size)
        pixels, _ = read_all(source, EvalTransform(28), bad=BadImages())
        torch.manual_seed(0)
        return binary(pixels / 127.5 - 1.0, "dynamic")

    def _compare(self, models: Any, images: Tensor, samples: int) -> dict[str, Any]:
        torch.manual_seed(0)
        ours = VectorVAE()
        theirs = peer(models, ours, samples)
        steps = our_step(ours, samples), their_step(theirs)

        # equal bounds
        bounds = [
            torch.tensor([step(images, learn=False) for _ in range(self.repeats)]) for step in steps
        ]
        means = [bound.mean().item() for bound in bounds]
        errors = [(bound.std() / len(bound) ** 0.5).item() for bound in bounds]

        # times in alternation
        ratios = []
        for number in range(self.rounds + 1):
            seconds = []
            for step in steps:
                start = time.perf_counter()
                for _ in range(self.updates):
                    step(images, learn=True)
                seconds.append(time.perf_counter() - start)
            if number:  # the first round warms up
                ratios.append(seconds[1] / seconds[0])
        ordered = sorted(ratios)
        return {
            "name": "VAE" if samples == 1 else f"IWAE, {samples} samples",
            "ours": means[0],
            "theirs": means[1],
            "ours_error": errors[0],
            "theirs_error": errors[1],
            "ratio": ordered[len(ordered) // 2],
            "least": ordered[0],
            "most": ordered[-1],
        }


def import_peer() -> Any:
    """Return pythae's modules. Raise UserError if pythae is not installed."""
    try:
        pythae: Any = importlib.import_module("pythae")
        for name in ("models", "models.base.base_utils", "models.nn"):
            importlib.import_module(f"pythae.{name}")
    except ImportError as error:
        raise UserError(
            f"pythae cannot be imported ({error}). Install pythae: pip install --no-deps --target "
            "peers pythae==0.1.2, and set PYTHONPATH=peers."
        ) from error
    return pythae


def peer(pythae: Any, ours: VectorVAE, samples: int) -> Any:
    """Return pythae's model with our weights."""
    output = pythae.models.base.base_utils.ModelOutput

    class Encoder(pythae.models.nn.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh()
            )
            self.mean, self.logvar = nn.Linear(200, 50), nn.Linear(200, 50)

        def forward(self, x: Tensor) -> Any:
            h = self.layers(x.flatten(1))
            return output(embedding=self.mean(h), log_covariance=self.logvar(h))

    class Decoder(pythae.models.nn.BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 784)
            )

        def forward(self, z: Tensor) -> Any:
            return output(reconstruction=self.layers(z).sigmoid().unflatten(1, (1, 28, 28)))

    options: dict[str, Any] = {
        "input_dim": (1, 28, 28),
        "latent_dim": 50,
        "reconstruction_loss": "bce",
    }
    if samples == 1:
        kind, config = pythae.models.VAE, pythae.models.VAEConfig(**options)
    else:
        kind = pythae.models.IWAE
        config = pythae.models.IWAEConfig(**options, number_samples=samples)
    theirs = kind(config, encoder=Encoder(), decoder=Decoder())

    encoder, decoder = theirs.encoder, theirs.decoder
    encoder.layers.load_state_dict(ours.encoder.layers.state_dict())
    for part, rows in ((encoder.mean, slice(0, 50)), (encoder.logvar, slice(50, 100))):
        part.load_state_dict({"weight": ours.moments.weight[rows], "bias": ours.moments.bias[rows]})
    state = ours.decoder.layers.state_dict()
    last = ours.decoder.last.state_dict()
    decoder.layers.load_state_dict(state | {f"4.{name}": value for name, value in last.items()})
    return theirs


def our_step(net: VectorVAE, samples: int) -> Any:
    options = VariationalConfig(bound="elbo" if samples == 1 else "iwae", train_samples=samples)
    loss_of = VariationalLoss(options, total=1)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def step(images: Tensor, *, learn: bool) -> float:
        out = net(images, samples=samples)
        loss, _ = loss_of(out, update=0)
        update(loss, adam, learn)
        weights = out.log_weights().detach()
        if samples == 1:
            return -loss.item()
        return (weights.softmax(0) * weights).sum(0).mean().item()

    return step


def their_step(net: Any) -> Any:
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)  # as in pythae's trainer

    def step(images: Tensor, *, learn: bool) -> float:
        loss = net({"data": (images + 1.0) / 2.0}).loss
        return update(loss, adam, learn)

    return step


def update(loss: Tensor, adam: torch.optim.Optimizer, learn: bool) -> float:
    """Return the bound in nats per image. If `learn` is True, also make a training update."""
    if learn:
        adam.zero_grad()
        loss.backward()
        adam.step()
    return -loss.item()


if __name__ == "__main__":
    try:
        parse_options(Options, sys.argv[1:], prog="vae_peers.py").run()
    except UserError as error:
        exit_with(error)
