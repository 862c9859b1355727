"""Compare samples of priors with photos, reconstructions and images of random tokens.

    python benchmarks/prior_quality.py --priors runs/prior0 runs/prior1 runs/prior2 \\
        --data imagenette/train --unseen imagenette/val --json prior.json

`data` holds the photos that the prior and its tokenizer learned from, in one folder per class, and
`unseen` holds other photos of the same classes. The script resizes all photos as in the encoding of
the prior's training tokens.

The columns of the table:

- kd: kernel distance to the unseen photos: the unbiased MMD^2 with the kernel (<x, y> / D + 1)^3 of
  features x and y with D dimensions. kd uses relu5_3 features of LPIPS' VGG16, not Inception
  features, so kd is not an FID or KID. A lower kd is better.
- class: share of the images whose predicted class is the class given to the prior, or the class of
  the photo. The ten training photos nearest to an image predict its class by vote. Distances are
  those of VGG16 features (`class vgg`) or of the tokenizer's features (`class codes`).
- near: median distance of the images to the nearest training photo, divided by the same median for
  reconstructions of the unseen photos. A value of `near` far below 1 means that the images are
  copies of training photos.
- copies: share of the images that are nearer to a training photo than 99 % of the reconstructions
  of the unseen photos. If no image is a copy, `copies` is about 0.01.

`near` and `copies` are also measured with both kinds of features. The table also has rows for real
training photos, for reconstructions of training and unseen photos, and for images of tokens drawn
independently with the frequencies of the training tokens (unigram). All classes have equally many
samples. If there are several priors (such as trainings with several seeds), each prior has a row,
and two more rows have the mean and the standard deviation over the priors.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentvae.autoencoder import Autoencoder
from latentvae.cli.flags import exit_with, parse_options
from latentvae.data import EvalTransform, ImageFolder, PixelFormat
from latentvae.errors import UserError
from latentvae.latents.formats.shards import Content
from latentvae.latents.items import find_labels
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.metrics.distribution import trunk_features, unbiased_mmd
from latentvae.models import calls
from latentvae.priors.sample import find_export, open_prior, read_content
from latentvae.priors.sampling import Sampling, sample_tokens

NEIGHBOURS = 10
BATCH = 50


@dataclass(frozen=True)
class Options:
    """Options: which priors to measure, and on which images."""

    priors: tuple[str, ...]
    """Priors to measure: output folders of `latentvae train-prior`, such as trainings with several
    seeds, or exported models. All priors must have the same tokenizer."""

    data: str
    """Folder of the training photos, in one folder per class."""

    unseen: str
    """Folder of photos that neither the prior nor its tokenizer learned from."""

    num: int = 1000
    """Number of images that are sampled from each prior."""

    guidance: float = 1.0
    """Weight of classifier-free guidance. 1 is no guidance. Larger values give samples that fit
    their class better but are less varied."""

    temperature: float = 1.0
    """Divide the logits by this number. Values below 1 prefer likely tokens."""

    top_k: int = 0
    """Number of codes from which each token is drawn: the most likely codes. With 0, each token is
    drawn from all codes."""

    seed: int = 0
    """Seed of the samples."""

    json: Path = Path("prior.json")
    """JSON file for the results."""


@dataclass(frozen=True)
class Images:
    """VGG16 features, tokenizer features and classes of a set of images.

    Attributes:
        vgg, codes, classes: VGG16 features (N, 512), tokenizer's features (N, D h w), classes (N,).
            A latent of the tokenizer has D channels and h w positions.
    """

    vgg: Tensor
    codes: Tensor
    classes: Tensor


class Features:
    """Computes VGG16 features and tokenizer features of images, and reconstructs images."""

    def __init__(self, tokenizer: Autoencoder) -> None:
        self.tokenizer = tokenizer
        self.vgg = PerceptualLoss(load_lpips("vgg"))

    @torch.inference_mode()
    def of(self, batches: Iterator[tuple[Tensor, Tensor]], total: int, name: str) -> Images:
        """Return the features of batches of (images in [-1, 1], classes)."""
        vgg, codes, classes = list[Tensor](), list[Tensor](), list[Tensor]()
        for images, labels in tqdm(batches, total=-(-total // BATCH), desc=name, disable=None):
            vgg.append(trunk_features(self.vgg.features(images)))
            codes.append(self.tokenizer.encode(images).flatten(1))
            classes.append(labels)
        return Images(torch.cat(vgg), torch.cat(codes), torch.cat(classes))

    @torch.inference_mode()
    def reconstructed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Any]:
        for images, labels in batches:
            tokens = self.tokenizer.encode_tokens(images)
            yield self.tokenizer.decode_tokens(tokens), labels


def photos(folder: str, content: Content, names: list[str]) -> tuple[Any, int]:
    """Return a function and the number of photos. The function yields batches (photos, classes).

    Raises:
        UserError: the classes of the folder are not those of the prior's training tokens.
    """
    pixels = PixelFormat(content.image_channels, content.value_range, ignore_icc=content.ignore_icc)
    source = ImageFolder(folder, pixels=pixels)
    labels = find_labels(source, label_column=None)
    if labels is None or labels.class_names != names:
        raise UserError(
            f"The folder '{folder}' must have the classes of the prior's training tokens: "
            f"{', '.join(names)}."
        )
    transform, classes = (
        EvalTransform(content.resolution, interpolation=content.interpolation),
        torch.tensor(labels.values),
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(source), BATCH):
            rows = range(start, min(start + BATCH, len(source)))
            pixels = torch.stack([transform(source.read(row)) for row in rows])
            yield pixels, classes[start : rows.stop]

    return batches, len(source)


def class_share(images: Tensor, classes: Tensor, train: Tensor, train_classes: Tensor) -> float:
    """Return the share of images whose class is the commonest of the 10 nearest training images."""
    nearest = torch.cdist(images, train).topk(NEIGHBOURS, largest=False).indices
    votes = F.one_hot(train_classes[nearest]).sum(dim=1)
    return (votes.argmax(dim=1) == classes).double().mean().item()


def nearest_distances(images: Tensor, train: Tensor) -> Tensor:
    """Return the distance of each image to the nearest training image, (N,)."""
    return torch.cdist(images, train).amin(dim=1)


def measured(images: Images, train: Images, own: Images) -> dict[str, float]:
    """Return the table columns `class`, `near` and `copies` of a set of images.

    Args:
        own: reconstructions of the unseen photos. `near` and `copies` compare the distances of
            `images` to the training photos with the distances of `own`.
    """
    found = {}
    for name in ("vgg", "codes"):
        x, seen, other = getattr(images, name), getattr(train, name), getattr(own, name)
        found[f"class {name}"] = class_share(x, images.classes, seen, train.classes)
        near, usual = nearest_distances(x, seen), nearest_distances(other, seen)
        found[f"near {name}"] = (near.median() / usual.median()).item()
        found[f"copies {name}"] = (near < usual.quantile(0.01)).double().mean().item()
    return found


def samples(options: Options, prior: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of sampled images and their classes."""
    pipe = open_prior(prior, device="cpu")
    sampling = Sampling(options.guidance, options.temperature, options.top_k)
    classes = pipe.all_classes(options.num)
    for start in range(0, options.num, BATCH):
        numbers = range(start, min(start + BATCH, options.num))
        chosen = classes[start : numbers.stop]
        drawn = sample_tokens(
            pipe.transformer, chosen, options=sampling, seed=options.seed, numbers=numbers
        )
        yield pipe.decode(drawn), chosen


@torch.inference_mode()
def unigram(
    options: Options, tokenizer: Autoencoder, train: Any, num_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and classes. Tokens are drawn independently, by their training frequencies."""
    tokens = torch.cat([tokenizer.encode_tokens(images) for images, _ in train])
    assert tokenizer.num_codes is not None
    counts = torch.bincount(tokens.flatten(), minlength=tokenizer.num_codes).double()
    draws = torch.Generator().manual_seed(options.seed)
    for start in range(0, options.num, BATCH):
        count = min(BATCH, options.num - start)
        shape = (count, *tokens.shape[1:])
        size = int(torch.tensor(shape).prod())
        drawn = counts.multinomial(size, replacement=True, generator=draws).reshape(shape)
        images = calls.decode_indices(tokenizer.net, drawn).clamp(-1, 1)
        yield images, torch.arange(start, start + count) % num_classes


def run(options: Options) -> None:
    """Measure photos, reconstructions and samples, print the table, and write the results."""
    # priors and photos
    folders = [find_export(Path(prior)) for prior in options.priors]
    content, names = read_content(folders[0]), list(read_content(folders[0]).class_names or [])
    for folder in folders[1:]:
        if read_content(folder).model_sha256 != content.model_sha256:
            raise UserError(
                "All priors must have the same tokenizer, but the tokenizers of "
                f"'{folder}' and '{folders[0]}' differ."
            )
    tokenizer = Autoencoder(open_prior(folders[0], device="cpu").vqvae, name="tokenizer")
    features = Features(tokenizer)
    seen, count = photos(options.data, content, names)
    other, other_count = photos(options.unseen, content, names)

    # real photos and their reconstructions
    train = features.of(seen(), count, "training photos")
    unseen = features.of(other(), other_count, "unseen photos")
    recon = features.of(features.reconstructed(seen()), count, "reconstructions")
    own = features.of(features.reconstructed(other()), other_count, "unseen reconstructions")
    rows = {
        "training photos": {"kd": unbiased_mmd(train.vgg, unseen.vgg)},
        "their reconstructions": {"kd": unbiased_mmd(recon.vgg, unseen.vgg)},
        "unseen reconstructions": measured(own, train, own),
    }
    found = features.of(unigram(options, tokenizer, seen(), len(names)), options.num, "unigram")
    rows["unigram"] = {"kd": unbiased_mmd(found.vgg, unseen.vgg), **measured(found, train, own)}

    # priors
    priors = {}
    for folder, given in zip(folders, options.priors, strict=True):
        found = features.of(samples(options, folder), options.num, given)
        distance = unbiased_mmd(found.vgg, unseen.vgg)
        priors[given] = {"kd": distance, **measured(found, train, own)}
    rows |= priors
    if len(priors) > 1:
        for name, statistic in (("mean", mean), ("standard deviation", stdev)):
            rows[f"priors, {name}"] = {
                key: statistic([row[key] for row in priors.values()])
                for key in next(iter(priors.values()))
            }

    _show(rows)
    saved = {"machine": machine(), "options": vars(options) | {"json": str(options.json)}}
    options.json.write_text(json.dumps(saved | {"rows": rows}, indent=1) + "\n")


def _show(rows: dict[str, dict[str, float]]) -> None:
    keys = list(rows["unigram"])
    table = Table("images", *keys)
    for name, values in rows.items():
        table.add_row(name, *(f"{values[key]:.4f}" if key in values else "" for key in keys))
    Console().print(table)


if __name__ == "__main__":
    try:
        run(parse_options(Options, sys.argv[1:], prog="prior_quality.py", description=__doc__))
    except UserError as error:
        exit_with(error)
