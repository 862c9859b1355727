"""Compare VQ-VAE-2s of two levels and one level at equal bits, and predict codes of the fine level.

    python benchmarks/code_levels.py --data photos --validation_data unseen --json out.json

For each seed, the script trains `vqvae2_small` with two levels and with one level, once for each
number of codes in the options. Each of these trainings is called an arm. All arms have the same
channel widths (at equal resolution), images, order of images and number of updates, and L2 as their
only pixel loss. The networks learn from random crops of photos. The script measures, on complete
unseen photos:

- the mean squared error of 8-bit reconstructions, for pixels in [-1, 1]
- true bits per image: the size of real files (`coding.token_codec`)
- bits per code of the fine (bottom) level, alone and given the codes of the coarse (top) level:
  the cross-entropy of a small network that predicts a code of the bottom level. The small network
  is fitted on the tokens of training photos. In the results, `context` says whether the small
  network also reads the bottom codes to the left and above.

For a comparison at equal bits, the error of one level is interpolated between two arms with one
level: those with the next lower and the next higher number of bits. An arm with two levels that
needs more or fewer bits than all arms with one level cannot be compared. If you run the command
again, finished arms are kept.
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
from latentvae.engine.muon import MuonWithAdamW
from latentvae.engine.schedule import learning_rate
from latentvae.errors import UserError
from latentvae.metrics.image import to_8bit
from latentvae.models import FAMILIES, VQVAE2
from latentvae.tasks.autoencoder import load_preset
from latentvae.tasks.autoencoder.codebook import CodebookUpdate

PRESET = load_preset("vqvae2_small")
FAMILY: Any = FAMILIES["vqvae2"]
START_VECTORS = 16  # number of vectors per code for k-means
PREDICTOR_TOKENS = 768_000  # number of bottom tokens that a predictor learns from
TWO, ONE = "two levels", "one level"


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

    two_level_codes: tuple[int, ...] = (16,)
    """Numbers of codes of each level, for the networks that have two levels of codes. One such
    network is trained for each number."""

    one_level_codes: tuple[int, ...] = (32, 64)
    """Numbers of codes for the networks that have a single map of codes. One such network is
    trained for each number."""

    updates: int = 2000
    """Number of updates of each training."""

    batch_size: int = 8
    """Number of images per update."""

    resolution: int = 224
    """Side of the photos in pixels. Unseen photos are measured at this size."""

    crop: int = 64
    """Side in pixels of the random crops that the networks learn from."""

    threads: int = 1
    """Number of CPU threads."""

    def settings(self) -> dict[str, Any]:
        """Return the options that must be equal for all trainings (arms) in one JSON file."""
        names = ("updates", "batch_size", "resolution", "crop")
        return {name: getattr(self, name) for name in names}


class RandomCrops:
    """Random square crops of photos, half of them mirrored.

    Args:
        photos: uint8 (N, 3, R, R).
        side: height and width of a crop in pixels.
        seed: seed of the positions and of the mirroring.
    """

    def __init__(self, photos: Tensor, *, side: int, seed: int) -> None:
        self.photos, self.side = photos, side
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, chosen: list[int]) -> Tensor:
        """Return one crop of each chosen photo, (B, 3, side, side) in [-1, 1]."""
        end = self.photos.shape[-1] - self.side + 1
        crops = []
        for i in chosen:
            y, x = torch.randint(end, (2,), generator=self.generator).tolist()
            crop = self.photos[i, :, y : y + self.side, x : x + self.side]
            mirrored = torch.rand((), generator=self.generator) < 0.5
            crops.append(crop.flip(2) if mirrored else crop)
        return as_images(torch.stack(crops))


def as_images(photos: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]."""
    return photos.float() / 127.5 - 1


def train(photos: Tensor, options: Options, *, levels: int, codes: int, seed: int) -> VQVAE2:
    """Return a network in eval mode, trained on photos (N, 3, R, R) of type uint8."""
    # network and codes
    torch.manual_seed(seed)
    shape = PRESET.model.shape()
    widths = shape["block_out_channels"]
    shape |= {
        "block_out_channels": widths[: len(widths) - 2 + levels],  # the finest level stays at f4
        "code_levels": levels,
        "quantizer": shape["quantizer"] | {"num_codes": codes},
    }
    net = FAMILY.build(**shape, sample_size=options.crop)
    wrapper, order = FAMILY.wrapper(net).train(), _order(len(photos), seed=seed)
    crops = RandomCrops(photos, side=options.crop, seed=seed)
    _start_codes(net, crops, seed=seed, images_per_update=options.batch_size)

    # updates
    config = PRESET.with_changes({"run": {"max_train_steps": options.updates}})
    optimizer = _optimizer(net)
    book = CodebookUpdate(FAMILY.quantizers(net), seed=seed)
    weight = PRESET.model.bottleneck.weights()["commitment"]
    for update in range(options.updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, peak=PRESET.optimizer.learning_rate, config=config)
        batch = crops([next(order) for _ in range(options.batch_size)])
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


def _optimizer(net: VQVAE2) -> MuonWithAdamW:
    """Return the optimizer of the preset, without weight decay."""
    options, matrices = PRESET.optimizer, FAMILY.matrices(net)
    chosen = {id(weight) for weight in matrices}
    return MuonWithAdamW(
        matrices,
        [weight for weight in net.parameters() if id(weight) not in chosen],
        lr=options.learning_rate,
        muon_lr=options.muon_learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=0.0,
        fused=True,
    )


@torch.no_grad()
def _start_codes(net: VQVAE2, crops: RandomCrops, *, seed: int, images_per_update: int) -> None:
    """Set the codes of one level after the other by k-means on features of random crops."""
    order = torch.randperm(len(crops.photos), generator=torch.Generator().manual_seed(seed))
    for place, quantizer in enumerate(FAMILY.quantizers(net)):
        own: Quantizer = quantizer
        features = FAMILY.features(net, crops(order[:1].tolist()))[place]
        count = -(-START_VECTORS * own.num_codes // features[0, 0].numel())
        parts = order[:count].split(16)
        found = torch.cat([FAMILY.features(net, crops(part.tolist()))[place] for part in parts])
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
def tokens_of(net: VQVAE2, photos: Tensor) -> list[Tensor]:
    """Return the token map (N, h_l, w_l) of each level, coarsest level first."""
    parts = photos.split(8)
    return net.maps(torch.cat([net.tokenize(as_images(part)).indices for part in parts]))


@torch.no_grad()
def measured(net: VQVAE2, photos: Tensor, maps: list[Tensor], *, codes: int) -> dict[str, Any]:
    """Return the error of reconstructions and the true bits per image."""
    parts = [as_images(part) for part in photos.split(8)]
    errors = [(to_8bit(net(part).sample) - part).square() for part in parts]
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
    """Predicts a code of the fine (bottom) level from its position and from other codes.

    Each code of the coarse (top) level covers 2 x 2 bottom codes. One input is the position of the
    predicted code among these 2 x 2 codes. The arguments `top` and `context` add top codes, and
    bottom codes to the left and above.

    Args:
        codes: number of codes K.
        top: whether the network reads the top code that covers the position, and its eight
            neighbours.
        context: whether the network reads two more bottom codes: the nearest code to the left and
            the nearest code above.
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
    images, order = len(train_maps[0]), _order(len(train_maps[0]), seed=seed)
    at_once = max(1, 4096 // train_maps[1][0].numel())  # images of a batch
    steps = epochs * images // at_once
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        chosen = [next(order) for _ in range(at_once)]
        tops, bottoms = (maps[chosen] for maps in train_maps)
        loss = F.cross_entropy(model(tops, bottoms).flatten(0, 2), bottoms.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # measure unseen tokens
    total = 0.0
    with torch.no_grad():
        for tops, bottoms in zip(*(maps.split(at_once) for maps in unseen_maps), strict=True):
            logits = model(tops, bottoms).flatten(0, 2)
            total += F.cross_entropy(logits, bottoms.flatten(), reduction="sum").item()
    return total / unseen_maps[1].numel() / float(np.log(2))


def run_arm(
    name: str, photos: Tensor, unseen: Tensor, options: Options, *, codes: int, seed: int
) -> dict[str, Any]:
    """Make one of the compared trainings (arms), and return its measurements."""
    start, levels = time.process_time(), 2 if name == TWO else 1
    net = train(photos, options, levels=levels, codes=codes, seed=seed)
    seconds = time.process_time() - start
    maps = tokens_of(net, unseen)
    found = measured(net, unseen, maps, codes=codes) | {"codes": codes, "cpu_seconds": seconds}
    if levels == 2:
        # Take photos at equal distances, because a folder lists its photos class by class.
        every = max(1, len(photos) * maps[1][0].numel() // PREDICTOR_TOKENS)
        known = tokens_of(net, photos[::every])
        found["bits_per_bottom_code"] = {
            f"{'given the top' if top else 'alone'}, {'with' if context else 'no'} context": (
                bits_of_bottom(known, maps, codes=codes, top=top, context=context, seed=seed)
            )
            for context in (False, True)
            for top in (False, True)
        }
    return found


def compared(result: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Compare each arm that has two levels with the arms of one level, at equal numbers of bits.

    Returns:
        For each arm with two levels: the number of codes, the bits, and the errors of two levels
        and of one level. The error of one level is interpolated between arms. This error is None if
        the arm with two levels needs more or fewer bits than all arms with one level.
    """
    runs = {name: run for name, run in result["runs"].items() if name.endswith(f"seed {seed}")}
    one = [(run["bits"], run["mse"]) for name, run in runs.items() if name.startswith(ONE)]
    if not one:
        return []

    bits, errors = zip(*sorted(one), strict=True)
    return [
        {
            "codes": run["codes"],
            "bits": run["bits"],
            "two_levels_mse": run["mse"],
            "one_level_mse": float(np.interp(run["bits"], bits, errors))
            if bits[0] <= run["bits"] <= bits[-1]
            else None,
        }
        for name, run in runs.items()
        if name.startswith(TWO)
    ]


def run(options: Options) -> dict[str, Any]:
    """Make all trainings (arms) whose results are not in the file, and return all results."""
    if not 1 <= options.crop <= options.resolution:
        raise UserError(
            f"crop must be from 1 to resolution, {options.resolution} (got {options.crop})."
        )

    result: dict[str, Any] = {"settings": options.settings(), "runs": {}}
    if options.json.exists():
        result = json.loads(options.json.read_text())
        if result["settings"] != options.settings():
            raise UserError(f"'{options.json}' has results of other settings. Give another file.")
    photos, unseen = (
        _loaded(spec, split, options.resolution)
        for spec, split in ((options.data, "train"), (options.validation_data, "validation"))
    )
    arms = [(TWO, codes) for codes in options.two_level_codes]
    arms += [(ONE, codes) for codes in options.one_level_codes]
    for seed in options.seeds:
        for name, codes in arms:
            key = f"{name}, {codes} codes, seed {seed}"
            if key not in result["runs"]:
                found = run_arm(name, photos, unseen, options, codes=codes, seed=seed)
                result["runs"][key] = found
                options.json.write_text(json.dumps(result, indent=1))
            print(key, json.dumps(result["runs"][key]), flush=True)
        for row in compared(result, seed):
            print(f"seed {seed}:", json.dumps(row), flush=True)
    return result


def _loaded(spec: str, split: str, resolution: int) -> Tensor:
    """Read all images of a source (such as a folder). Return centre crops, uint8 (N, 3, R, R)."""
    source = open_source(spec, split=split)
    batches = validation_batches(source, EvalTransform(resolution), batch_size=16)
    return torch.cat([((images + 1) * 127.5).round().byte() for images, _ in batches])


def main() -> None:
    try:
        options = parse_options(Options, sys.argv[1:], prog="code_levels.py", description=__doc__)
        torch.set_num_threads(options.threads)
        run(options)
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
