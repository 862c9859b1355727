"""Compare a VQ-VAE-2 of two levels with one level at equal bits, and measure the top's information.

    python benchmarks/code_levels.py --data photos --validation_data unseen --json out.json

For each seed, the script trains `vqvae2_small` with two levels and with one level of more codes.
Each of these trainings is called an arm. All arms have the same widths, images, order and number of
updates, and L2 as their only pixel loss. The script measures on unseen photos:

- the mean squared error of 8-bit reconstructions, for pixels in [-1, 1]
- true bits per image: the size of real files (`coding.token_codec`)
- information of the codes of the fine (bottom) level: alone, and given the codes of the coarse
  (top) level, in bits per code. A small network predicts a code. It is fitted on the tokens of the
  training photos. `context` says whether the small network also reads the codes to the left and
  above.

For a comparison at equal bits, the error of one level is interpolated between its arms. If all arms
of one level need more bits than two levels, the arm with the fewest bits is compared. If you run
the command again, finished arms are kept.
"""

import json
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

from latentvae.bottlenecks import Quantizer
from latentvae.cli.flags import exit_with, parse_options
from latentvae.coding.token_codec import encode_levels, encode_tokens
from latentvae.data import EvalTransform, open_source
from latentvae.data.dataset import validation_batches
from latentvae.engine.schedule import learning_rate
from latentvae.errors import UserError
from latentvae.metrics.image import to_8bit
from latentvae.models import FAMILIES, VQVAE2
from latentvae.tasks.autoencoder import load_preset
from latentvae.tasks.autoencoder.codebook import CodebookUpdate

PRESET = load_preset("vqvae2_small")
FAMILY: Any = FAMILIES["vqvae2"]
START_VECTORS = 16  # number of vectors per code for k-means
TWO = "two levels"


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

    codes: int = 256
    """Number of codes of each level, in the network with two levels of codes."""

    one_level_codes: tuple[int, ...] = (512, 1024)
    """Codebook sizes for the networks that have a single map of codes. One such network is trained
    for each size."""

    updates: int = 500
    """Number of updates of each training."""

    batch_size: int = 8
    """Number of images per update."""

    resolution: int = 64
    """Side of the images in pixels."""

    threads: int = 1
    """Number of CPU threads."""

    def settings(self) -> dict[str, Any]:
        """Return the options that must be equal for all trainings (arms) in one JSON file."""
        return {name: getattr(self, name) for name in ("updates", "batch_size", "resolution")}


def train(images: Tensor, options: Options, *, levels: int, codes: int, seed: int) -> VQVAE2:
    """Return a trained network in eval mode."""
    # network and codes
    torch.manual_seed(seed)
    shape = PRESET.model.shape()
    widths = shape["block_out_channels"]
    shape |= {
        "block_out_channels": widths[: len(widths) - 2 + levels],  # the finest level stays at f4
        "code_levels": levels,
        "quantizer": shape["quantizer"] | {"num_codes": codes},
    }
    net = FAMILY.build(**shape, sample_size=options.resolution)
    wrapper, order = FAMILY.wrapper(net).train(), _order(len(images), seed=seed)
    _start_codes(net, images, seed=seed, images_per_update=options.batch_size)

    # updates
    config = PRESET.with_changes({"run": {"max_train_steps": options.updates}})
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0, fused=True)
    book = CodebookUpdate(FAMILY.quantizers(net), seed=seed)
    weight = PRESET.model.bottleneck.weights()["commitment"]
    for update in range(options.updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, peak=PRESET.optimizer.learning_rate, config=config)
        batch = images[[next(order) for _ in range(options.batch_size)]]
        out = wrapper(batch)
        loss = F.mse_loss(out.recon, batch) + weight * out.latent_losses["commitment"]
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), PRESET.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        book.add(out)
        book.apply(update, optimizer=optimizer, averages={})
        book.clear()
    return net.eval()


@torch.no_grad()
def _start_codes(net: VQVAE2, images: Tensor, *, seed: int, images_per_update: int) -> None:
    """Set the codes of one level after the other by k-means on features of random images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for place, quantizer in enumerate(FAMILY.quantizers(net)):
        own: Quantizer = quantizer
        features = FAMILY.features(net, images[order[:1]])[place]
        count = -(-START_VECTORS * own.num_codes // features[0, 0].numel())
        parts = images[order[:count]].split(16)
        found = torch.cat([FAMILY.features(net, part)[place] for part in parts])
        own.initialise(
            found.movedim(1, -1).flatten(0, -2),
            generator=torch.Generator().manual_seed(seed),
            batch_vectors=images_per_update * features[0, 0].numel(),
        )


def _order(count: int, *, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def tokens_of(net: VQVAE2, images: Tensor) -> list[Tensor]:
    """Return the token map (N, h_l, w_l) of each level, coarsest level first."""
    return net.maps(torch.cat([net.tokenize(part).indices for part in images.split(32)]))


@torch.no_grad()
def measured(net: VQVAE2, images: Tensor, maps: list[Tensor], *, codes: int) -> dict[str, Any]:
    """Return the error of reconstructions and the true bits per image."""
    errors = [(to_8bit(net(part).sample) - part).square() for part in images.split(32)]
    arrays = [level.numpy() for level in maps]
    files = [encode_levels(levels, num_codes=codes) for levels in zip(*arrays, strict=True)]
    alone = [[encode_tokens(level, num_codes=codes) for level in own] for own in arrays]
    return {
        "mse": torch.cat(errors).double().mean().item(),
        "bits": 8 * float(np.mean([len(file) for file in files])),
        "bits_of_levels": [8 * float(np.mean([len(file) for file in own])) for own in alone],
        "codes_used": [len(level.unique()) for level in maps],
    }


class Predictor(nn.Module):
    """Predicts a code of the fine (bottom) level from other codes.

    The inputs are codes of the coarse (top) level, codes of the bottom level to the left and above,
    or both.

    Args:
        codes: number of codes K.
        top: whether the network reads the top code that covers the position, and its eight
            neighbours.
        context: whether the network reads the bottom codes to the left and above.
        width: number of channels of an embedding.
    """

    def __init__(self, codes: int, *, top: bool, context: bool, width: int = 16) -> None:
        super().__init__()
        self.pad, self.top, self.context = codes, top, context  # K stands for "outside the image"
        self.embed_top = nn.Embedding(codes + 1, width)
        self.embed = nn.Embedding(codes + 1, width)
        self.phase = nn.Embedding(4, width)  # position within the 2 x 2 codes of a top code
        inputs = width * (1 + 9 * top + 2 * context)
        self.layers = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, codes))

    def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
        """Return logits (N, h, w, K) for top (N, h/2, w/2) and bottom (N, h, w) codes."""
        rows, columns = (torch.arange(side) % 2 for side in bottom.shape[1:])
        phase = self.phase(2 * rows[:, None] + columns).expand(len(bottom), -1, -1, -1)
        parts = [phase]
        if self.top:
            padded = F.pad(top, (1, 1, 1, 1), value=self.pad)
            near = padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)  # (N, h/2, w/2, 9)
            found = self.embed_top(near).flatten(3)
            parts.append(found.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))
        if self.context:
            padded = F.pad(bottom, (1, 0, 1, 0), value=self.pad)
            parts += [self.embed(padded[:, 1:, :-1]), self.embed(padded[:, :-1, 1:])]
        return self.layers(torch.cat(parts, dim=3))


def bits_of_bottom(
    train_maps: list[Tensor],
    unseen_maps: list[Tensor],
    *,
    codes: int,
    top: bool,
    context: bool,
    seed: int,
    epochs: int = 2,
) -> float:
    """Fit a `Predictor` on training tokens. Return bits per bottom code of unseen photos."""
    # fit on training tokens
    torch.manual_seed(seed)
    model = Predictor(codes, top=top, context=context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    order = _order(len(train_maps[0]), seed=seed)
    steps = epochs * len(train_maps[0]) // 16
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        chosen = [next(order) for _ in range(16)]
        tops, bottoms = (maps[chosen] for maps in train_maps)
        loss = F.cross_entropy(model(tops, bottoms).flatten(0, 2), bottoms.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # measure unseen tokens
    with torch.no_grad():
        logits = model(*unseen_maps).flatten(0, 2)
        return F.cross_entropy(logits, unseen_maps[1].flatten()).item() / float(np.log(2))


def run_arm(
    name: str, images: Tensor, unseen: Tensor, options: Options, *, codes: int, seed: int
) -> dict[str, Any]:
    """Make one of the compared trainings (arms), and return its measurements."""
    start, levels = time.process_time(), 2 if name == TWO else 1
    net = train(images, options, levels=levels, codes=codes, seed=seed)
    seconds = time.process_time() - start
    maps = tokens_of(net, unseen)
    found = measured(net, unseen, maps, codes=codes) | {"codes": codes, "cpu_seconds": seconds}
    if levels == 2:
        known = tokens_of(net, images)
        found["bits_per_bottom_code"] = {
            f"{'given the top' if top else 'alone'}, {'with' if context else 'no'} context": (
                bits_of_bottom(known, maps, codes=codes, top=top, context=context, seed=seed)
            )
            for context in (False, True)
            for top in (False, True)
        }
    return found


def compared(result: dict[str, Any], seed: int) -> dict[str, float | None]:
    """Return the error of two levels, and the error of one level at an equal number of bits.

    `one_level_mse` is interpolated between the trainings (arms) of one level. If all of these arms
    need more bits than two levels, it is the error of the arm with the fewest bits. If all need
    fewer bits, it is None.
    """
    runs = {name: run for name, run in result["runs"].items() if name.endswith(f"seed {seed}")}
    two = next(run for name, run in runs.items() if name.startswith(TWO))
    one = sorted((run["bits"], run["mse"]) for run in runs.values() if run is not two)
    bits, errors = zip(*one, strict=True)
    at = float(np.interp(two["bits"], bits, errors))
    return {
        "bits": two["bits"],
        "two_levels_mse": two["mse"],
        "one_level_mse": None if two["bits"] > bits[-1] else at,
        "fewest_one_level_bits": bits[0],
    }


def run(options: Options) -> dict[str, Any]:
    """Make all trainings (arms) whose results are not in the file, and return all results."""
    result: dict[str, Any] = {"settings": options.settings(), "runs": {}}
    if options.json.exists():
        result = json.loads(options.json.read_text())
        if result["settings"] != options.settings():
            raise UserError(f"'{options.json}' has results of other settings. Give another file.")
    images, unseen = (
        _loaded(spec, split, options.resolution)
        for spec, split in ((options.data, "train"), (options.validation_data, "validation"))
    )
    arms = [(TWO, options.codes), *(("one level", codes) for codes in options.one_level_codes)]
    for seed in options.seeds:
        for name, codes in arms:
            key = f"{name}, {codes} codes, seed {seed}"
            if key not in result["runs"]:
                found = run_arm(name, images, unseen, options, codes=codes, seed=seed)
                result["runs"][key] = found
                options.json.write_text(json.dumps(result, indent=1))
            print(key, json.dumps(result["runs"][key]), flush=True)
        print(f"seed {seed}:", json.dumps(compared(result, seed)), flush=True)
    return result


def _loaded(spec: str, split: str, resolution: int) -> Tensor:
    """Read all images of a source (such as a folder). Return centre crops (N, 3, R, R)."""
    source = open_source(spec, split=split)
    batches = validation_batches(source, EvalTransform(resolution), batch_size=16)
    return torch.cat([images for images, _ in batches])


def main() -> None:
    try:
        options = parse_options(Options, sys.argv[1:], prog="code_levels.py", description=__doc__)
        torch.set_num_threads(options.threads)
        run(options)
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
