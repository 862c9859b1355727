"""Compare the KL of a VAE with and without a flow as its prior, at equal reconstruction error.

    python benchmarks/flow_vae.py --data photos --validation_data unseen --json out.json

For each seed, the script trains a small AutoencoderKL at several weights of the KL. The compared
models (arms) are:

- "plain": the standard normal prior
- "flow": a learned prior (a normalising flow), as with the option `--posterior_flow`
- "flow, fixed variance": a learned prior, and a fixed variance of the posterior, as with
  `--posterior_logvar`. This arm is not trained by default.

All compared models have the same images, order of images, noise and number of updates. "plain" and
"flow" also have the same initial weights. "flow, fixed variance" has other initial weights of the
decoder, because the decoder is first fitted to latents with this variance. The loss is the mean
squared error plus the weighted KL, as in `latentvae.losses.objective`. The script measures these
values on unseen photos:

- the PSNR of 8-bit reconstructions, from posterior samples and from the posterior's mean. The PSNR
  is computed from the mean squared error over all photos.
- the KL in bits per latent element. Without a flow, the KL has a closed form. With a flow, the KL
  is a mean over many samples, and the script gives its standard error.

To compare the KL at equal PSNR, the KL of the plain VAE is interpolated between its trainings with
different weights of the KL. If you run the command again, finished trainings are not repeated.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentvae.cli.flags import exit_with, parse_options
from latentvae.compute.upsampling import fold_upsampling
from latentvae.data import EvalTransform, open_source, some_of
from latentvae.data.dataset import validation_batches
from latentvae.engine.schedule import learning_rate
from latentvae.errors import UserError
from latentvae.metrics.image import to_8bit
from latentvae.models import FAMILIES
from latentvae.models.conv.kl import KLModelConfig
from latentvae.models.conv.linear_start import patch_codes, start_decoder, start_encoder
from latentvae.tasks.autoencoder import load_preset

PRESET = load_preset("kl_small")
FAMILY = FAMILIES["kl"]
START_IMAGES = 256  # number of images for the linear start
PLAIN, FLOW, FIXED = "plain", "flow", "flow, fixed variance"


@dataclass(frozen=True)
class Options:
    """What to train on, and for how long."""

    data: str
    """Folder of training images."""

    validation_data: str
    """Folder of unseen images."""

    json: Path
    """JSON file for the results. If the file already has the results of a network, this network is
    not trained again."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings. Each network is trained once with each seed."""

    arms: tuple[str, ...] = (PLAIN, FLOW)
    """Networks to train: plain (no flow), flow, or "flow, fixed variance" (a flow, and a fixed
    variance of the posterior)."""

    kl_weights: tuple[float, ...] = (0.006, 0.03, 0.15)
    """Weights of the KL (as in `--kl_scale`) with which the plain VAE is trained."""

    flow_kl_weights: tuple[float, ...] = (0.05, 0.15)
    """Weights of the KL (as in `--kl_scale`) for the networks with a flow. Choose weights with
    which the PSNR of these networks lies between the smallest and the largest PSNR of the plain
    VAE."""

    layers: int = 8
    """Number of coupling layers of the flow."""

    width: int = 64
    """Number of hidden channels of each layer of the flow."""

    logvar: float = -1.386
    """Log-variance of the posteriors of the network "flow, fixed variance". The value -1.386 means
    a standard deviation of 0.5."""

    latent_channels: int = 4
    """Number of latent channels."""

    block_out_channels: tuple[int, ...] = (16, 32, 64)
    """Number of channels of each level of the network, from full resolution down."""

    max_images: int = 3000
    """Largest number of training images. If the folder has more, this many are chosen at equal
    distances in the list of all images."""

    samples: int = 8
    """Number of posterior samples of each unseen photo. The KL to the flow is estimated from these
    samples."""

    updates: int = 300
    """Number of updates of each training."""

    batch_size: int = 8
    """Number of images per update."""

    resolution: int = 32
    """Side of the images in pixels."""

    threads: int = 1
    """Number of CPU threads."""

    def settings(self) -> dict[str, Any]:
        """Return the options that must be equal for all trainings in one JSON file."""
        names = (
            "updates batch_size resolution layers width logvar latent_channels block_out_channels "
            "max_images samples"
        )
        found = {name: getattr(self, name) for name in names.split()}
        return found | {"block_out_channels": list(self.block_out_channels)}

    def model(self, arm: str) -> KLModelConfig:
        """Return the options of an arm's network (plain, flow, or flow with fixed variance)."""
        fixed = arm == FIXED
        return KLModelConfig(
            block_out_channels=self.block_out_channels,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=self.latent_channels,
            posterior_flow=0 if arm == PLAIN else self.layers,
            posterior_flow_channels=KLModelConfig().posterior_flow_channels
            if arm == PLAIN
            else self.width,
            posterior_logvar=self.logvar if fixed else None,
            initial_posterior_logvar=0.0 if fixed else -2.0,
        )


def train(images: Tensor, options: Options, *, arm: str, kl_weight: float, seed: int) -> Any:
    """Train a network. Return its wrapper in eval mode. The wrapper also computes the KL."""
    # network, and its linear start
    torch.manual_seed(seed)
    model = options.model(arm)
    net = FAMILY.build(**model.shape(), sample_size=options.resolution)
    FAMILY.write_constants(net, model)
    codes = patch_codes(images[:START_IMAGES], levels=int(math.log2(model.f)))
    start_encoder(net, codes, d=options.latent_channels, whiten=True)
    z = torch.cat([FAMILY.encode(net, part, sample=True) for part in images[:64].split(16)])
    start_decoder(net, codes, z.detach(), images[:64])
    fold_upsampling(net)
    wrapper: Any = FAMILY.wrap(net, model).train()
    order = _order(len(images), seed=seed)

    # updates
    config = PRESET.with_changes({"run": {"max_train_steps": options.updates}})
    optimizer = torch.optim.AdamW(wrapper.parameters(), weight_decay=0.0, fused=True)
    for update in range(options.updates):
        torch.manual_seed(1_000_000 * seed + update)  # noise of the posteriors, equal in all arms
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, peak=PRESET.optimizer.learning_rate, config=config)
        batch = images[[next(order) for _ in range(options.batch_size)]]
        out = wrapper(batch)
        loss = F.mse_loss(out.recon, batch) + kl_weight * out.kl.mean() / batch[0].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(wrapper.parameters(), PRESET.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return wrapper.eval()


def _order(count: int, *, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def measured(wrapper: Any, images: Tensor, *, samples: int) -> dict[str, float]:
    """Return PSNR and KL on images. The noise has a fixed seed, equal for all trainings.

    The KL is a mean over images and samples. Its standard error counts only the random samples, not
    the choice of images.
    """
    torch.manual_seed(0)
    errors: dict[str, list[Tensor]] = {"sample": [], "mean": []}
    kls = []
    for part in images.split(32):
        moments = wrapper.net.encode(part).latent_dist.parameters
        drawn = [wrapper.bottleneck(moments) for _ in range(samples)]
        bits = [found.kl.double() / (found.z[0].numel() * math.log(2.0)) for found in drawn]
        kls.append(torch.stack(bits))  # (samples, B)
        for name, z in (("sample", drawn[0].z), ("mean", drawn[0].mean)):
            recon = to_8bit(wrapper.decode(z, part))
            errors[name].append((recon - part).square().flatten(1).mean(1))
    kl = torch.cat(kls, dim=1)
    noise = kl.var(dim=0).mean() / kl.numel() if samples > 1 else torch.zeros(())
    psnr = {
        f"psnr_{name}": 10 * math.log10(4.0 / torch.cat(found).double().mean().item())
        for name, found in errors.items()
    }
    return psnr | {"kl_bits": kl.mean().item(), "kl_standard_error": noise.sqrt().item()}


def run_arm(
    images: Tensor, unseen: Tensor, options: Options, *, arm: str, kl_weight: float, seed: int
) -> dict[str, Any]:
    """Train one model at one weight of the KL, and return its measurements on unseen photos.

    The result also has the KL on training photos and the CPU seconds of the training.
    """
    start = time.process_time()
    wrapper = train(images, options, arm=arm, kl_weight=kl_weight, seed=seed)
    seconds = time.process_time() - start
    found = measured(wrapper, unseen, samples=options.samples)
    known = measured(wrapper, images[: len(unseen)], samples=1)
    return {
        "arm": arm,
        "kl_weight": kl_weight,
        "seed": seed,
        **found,
        "training_kl_bits": known["kl_bits"],
        "cpu_seconds": seconds,
    }


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each VAE with a flow and the plain VAE of the same seed, at equal PSNR.

    `plain_bits` is the KL of the plain VAE at the PSNR of the VAE with a flow. The logarithm of the
    bits is interpolated linearly in the PSNR of posterior samples. VAEs with a flow are left out if
    their PSNR is outside the range of the plain VAE.
    """
    rows = []
    for run in runs:
        plain = [p for p in runs if p["arm"] == PLAIN and p["seed"] == run["seed"]]
        if run["arm"] == PLAIN or not plain:
            continue

        # the plain VAE at this PSNR
        curve = sorted((p["psnr_sample"], p["kl_bits"]) for p in plain)
        psnr, bits = zip(*curve, strict=True)
        if not psnr[0] <= run["psnr_sample"] <= psnr[-1]:
            continue

        at = float(np.exp(np.interp(run["psnr_sample"], psnr, np.log(bits))))
        rows.append(
            {
                "arm": run["arm"],
                "seed": run["seed"],
                "kl_weight": run["kl_weight"],
                "psnr_sample": run["psnr_sample"],
                "bits": run["kl_bits"],
                "plain_bits": at,
                "saved": 1 - run["kl_bits"] / at,
            }
        )
    return rows


def table(runs: list[dict[str, Any]]) -> str:
    """Return a table of all runs, and a table of the comparison at equal PSNR."""
    lines = ["arm                   seed  KL weight  PSNR sample  PSNR mean  KL bits  seconds"]
    for r in runs:
        lines.append(
            f"{r['arm']:20}  {r['seed']:4}  {r['kl_weight']:9g}  {r['psnr_sample']:11.2f}  "
            f"{r['psnr_mean']:9.2f}  {r['kl_bits']:7.3f}  {r['cpu_seconds']:7.0f}"
        )
    lines += ["", "arm                   seed  PSNR sample  KL bits  plain at this PSNR  saved"]
    for r in compared(runs):
        lines.append(
            f"{r['arm']:20}  {r['seed']:4}  {r['psnr_sample']:11.2f}  {r['bits']:7.3f}  "
            f"{r['plain_bits']:18.3f}  {r['saved']:5.1%}"
        )
    return "\n".join(lines)


def run(options: Options) -> dict[str, Any]:
    """Make all trainings whose results are not in the file, and return all results."""
    if unknown := [arm for arm in options.arms if arm not in (PLAIN, FLOW, FIXED)]:
        raise UserError(f"arms must be {PLAIN}, {FLOW} or '{FIXED}' (got '{unknown[0]}').")
    result: dict[str, Any] = {"settings": options.settings(), "runs": {}}
    if options.json.exists():
        result = json.loads(options.json.read_text())
        if result["settings"] != options.settings():
            raise UserError(f"'{options.json}' has results of other options. Give another file.")

    # images
    images = _loaded(options.data, "train", options.resolution, at_most=options.max_images)
    unseen = _loaded(options.validation_data, "validation", options.resolution)

    # arms
    for seed in options.seeds:
        for arm in options.arms:
            for kl_weight in options.kl_weights if arm == PLAIN else options.flow_kl_weights:
                key = f"{arm}, KL weight {kl_weight:g}, seed {seed}"
                if key in result["runs"]:
                    continue
                result["runs"][key] = run_arm(
                    images, unseen, options, arm=arm, kl_weight=kl_weight, seed=seed
                )
                options.json.write_text(json.dumps(result, indent=1))
                print(key, json.dumps(result["runs"][key]), file=sys.stderr, flush=True)

    # comparison
    result["compared"] = compared(list(result["runs"].values()))
    options.json.write_text(json.dumps(result, indent=1))
    print(table(list(result["runs"].values())))
    return result


def _loaded(spec: str, split: str, resolution: int, *, at_most: int = 10**9) -> Tensor:
    """Read images of a source (such as a folder). Return centre crops (N, 3, R, R)."""
    source = some_of(open_source(spec, split=split), at_most)
    batches = validation_batches(source, EvalTransform(resolution), batch_size=16)
    return torch.cat([images for images, _ in batches])


def main() -> None:
    try:
        options = parse_options(Options, sys.argv[1:], prog="flow_vae.py", description=__doc__)
        torch.set_num_threads(options.threads)
        run(options)
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
