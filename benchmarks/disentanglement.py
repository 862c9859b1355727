"""Compare beta-VAE and FactorVAE on sprites with known factors of variation.

    python benchmarks/disentanglement.py --out runs --updates 5000 --json out.json

For each seed, the script trains the preset `beta_sprites` with each weight of the KL in `--betas`,
and the preset `factor_sprites` with each weight of the total correlation in `--gammas`. The script
measures these values on sprites whose factors are chosen at random:

- the reconstruction error (negative log-likelihood in nats) and the KL
- the total correlation, estimated from 400 codes and 100,000 posteriors (see
  `losses.total_correlation.measure_kl_parts`). For a KL of 10 nats, an estimate from far fewer
  posteriors is too large.
- four scores of disentanglement: the FactorVAE score, MIG, SAP and DCI

To compare at equal reconstruction error, the total correlation of the beta-VAE is interpolated
between the trainings with different weights of the KL. If you run the command again, finished runs
are not repeated.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentvae.cli.flags import exit_with, parse_options
from latentvae.config.presets import load_preset
from latentvae.data import EvalTransform, PixelFormat
from latentvae.data.sprites import SIZES, Sprites, sample_sprite_factors, sprite_indices
from latentvae.engine.loop import train
from latentvae.errors import UserError
from latentvae.losses.total_correlation import measure_kl_parts
from latentvae.metrics.disentanglement import dci, factor_vae_score, mig, sap
from latentvae.models.likelihood_models import load_likelihood_net
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.images import binary
from latentvae.tasks.likelihood.task import LikelihoodTask

BATCH = 200
CODES = 2000  # number of images for the reconstruction error and the scores
AGGREGATE, TC_CODES = 100_000, 400  # numbers of posteriors and of codes for the total correlation
VOTES = 400  # number of votes of the FactorVAE score
SHAPE = 0  # index of the factor whose values have no order
MEASURES = ("error", "kl", "tc", "factor_vae_score", "mig", "sap", "dci")


@dataclass(frozen=True)
class Options:
    """Options: which networks to train and measure, and where to write the results."""

    out: Path
    """Folder for the files of the trainings."""

    json: Path
    """JSON file for the results."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings. Each network is trained once with each seed."""

    betas: tuple[float, ...] = (1.0, 4.0, 8.0)
    """Weights of the KL term (beta) of the beta-VAE. One network is trained for each weight and
    seed."""

    gammas: tuple[float, ...] = (10.0,)
    """Weights of the total correlation (gamma) of FactorVAE. One network is trained for each weight
    and seed."""

    updates: int = 5000
    """Number of updates of each training."""

    def run(self) -> None:
        """Train, measure and compare all networks, print the results, and write the JSON file."""
        rows = []
        for seed in self.seeds:
            arms = [("beta-VAE", "beta_sprites", {"kl_scale": b}) for b in self.betas]
            arms += [("FactorVAE", "factor_sprites", {"tc_scale": g}) for g in self.gammas]
            for name, preset, options in arms:
                rows.append(self._row(name, preset, options, seed))
                print(shown(rows[-1]), flush=True)
        pairs = compared(rows)
        for pair in pairs:
            print(
                f"seed {pair['seed']}: {pair['name']} {pair['weight']:g} has a total correlation "
                f"of {pair['tc']:.3f}, beta-VAE at the same reconstruction {pair['beta_tc']:.3f}"
            )
        options = {k: str(v) for k, v in asdict(self).items()}
        result = {"options": options, "rows": rows, "compared": pairs}
        self.json.write_text(json.dumps(result, indent=1) + "\n")

    def _row(self, name: str, preset: str, options: dict[str, float], seed: int) -> dict[str, Any]:
        weight = next(iter(options.values()))
        folder = self.out / f"{name}-{weight:g}-{seed}"
        config = load_preset(preset, LikelihoodConfig, max_train_steps=self.updates)
        run = {"output_dir": str(folder), "seed": seed, "log_steps": 500}
        run |= {"checkpointing_steps": self.updates, "validation_steps": self.updates}
        train(LikelihoodTask(config.with_changes({"objective": options, "run": run})))
        return {"name": name, "weight": weight, "seed": seed, **measure(folder)}


def measure(folder: Path) -> dict[str, float]:
    """Return the measures of a finished run."""
    net: Any = load_likelihood_net(folder)[0]
    rng = np.random.default_rng(0)
    factors = sample_sprite_factors(CODES, rng)

    # codes, reconstruction and KL
    codes, logvars, error, kl = [], [], 0.0, 0.0
    torch.manual_seed(0)
    with torch.no_grad():
        for images in batches(factors, net.image_shape[1]):
            posterior, bound = net.posterior(images), net(images)
            codes.append(posterior.mean)
            logvars.append(posterior.logvar)
            error -= bound.log_likelihood.sum().item() / CODES
            kl += bound.kl.sum().item() / CODES
    mean, logvar = torch.cat(codes), torch.cat(logvars)
    with torch.no_grad():
        more = sample_sprite_factors(AGGREGATE - CODES, rng)
        found = [net.posterior(images) for images in batches(more, net.image_shape[1])]
    draws = torch.Generator().manual_seed(0)
    parts = measure_kl_parts(
        torch.cat([mean, *(posterior.mean for posterior in found)]),
        torch.cat([logvar, *(posterior.logvar for posterior in found)]),
        codes=TC_CODES,
        generator=draws,
    )

    def represent(chosen: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found = [net.posterior(i).mean for i in batches(chosen, net.image_shape[1])]
        return torch.cat(found).numpy()

    score = factor_vae_score(represent, SIZES, num_train=VOTES, num_test=VOTES)
    return {
        "error": error,
        "kl": kl,
        "tc": parts.total_correlation.item(),
        "information": parts.information.item(),
        "factor_vae_score": score.score,
        "mig": mig(mean.numpy(), factors),
        "sap": sap(mean.numpy(), factors, categorical=(SHAPE,)),
        "dci": dci(mean.numpy(), factors, categorical=(SHAPE,)).disentanglement,
    }


def batches(factors: np.ndarray, side: int) -> Iterator[Tensor]:
    """Yield binary images (B, 1, side, side) in [-1, 1] with the given factors."""
    source, transform = Sprites(pixels=PixelFormat(channels=1)), EvalTransform(side)
    numbers = sprite_indices(factors)
    for start in range(0, len(numbers), BATCH):
        chosen = numbers[start : start + BATCH]
        yield binary(torch.stack([transform(source.read(int(i))) for i in chosen]), "threshold")


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each FactorVAE with the beta-VAE of the same seed, at equal reconstruction error.

    FactorVAEs whose error is outside the range of the beta-VAEs' errors are left out.
    """
    pairs = []
    for row in rows:
        betas = sorted(
            (r["error"], r["tc"])
            for r in rows
            if r["name"] == "beta-VAE" and r["seed"] == row["seed"]
        )
        if row["name"] == "beta-VAE" or not betas:
            continue
        errors, correlations = zip(*betas, strict=True)
        if not errors[0] <= row["error"] <= errors[-1]:
            continue
        same = float(np.interp(row["error"], errors, correlations))
        pairs.append({k: row[k] for k in ("name", "weight", "seed", "tc")} | {"beta_tc": same})
    return pairs


def shown(row: dict[str, Any]) -> str:
    """Return a row of the table as text."""
    values = ", ".join(f"{name} {row[name]:.3f}" for name in MEASURES)
    return f"{row['name']} {row['weight']:g}, seed {row['seed']}: {values}"


if __name__ == "__main__":
    try:
        parse_options(Options, sys.argv[1:], prog="disentanglement.py").run()
    except UserError as error:
        exit_with(error)
