"""Prepare latents for `latentvae prove`. The generator is a DiT that learns by flow matching.

Symbols: `n` images, `d` latent channels, `h w` latent positions.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from latentvae.latents.shard_dataset import LatentDataset
from latentvae.priors.dit import build_dit, sample_latents
from latentvae.priors.flow_matching import FlowSampling, noise_of
from latentvae.proofs.generator_proof.settings import ProofSettings
from latentvae.proofs.generator_proof.subject import (
    CODE,
    Subject,
    batches,
    proof_run,
)
from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.flow.latents import LatentData, LatentTable, joined, measured_normalization
from latentvae.tasks.flow.task import FlowTask

HEAD_DIM = 32


class ProofFlow(FlowTask):
    """Train a generator of `latentvae prove` on given latents. The training saves no pictures.

    Args:
        config: options of the run.
        data: the latents.
    """

    most_classes = None

    def __init__(self, config: LatentFlowConfig, data: LatentData) -> None:
        super().__init__(config)
        self._given = data

    def open_data(self) -> LatentData:
        return self._given

    def open_autoencoder(self) -> None:
        return None

    def save_samples(self, path: Path) -> bool:
        return False

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        self.net.save_pretrained(out)
        return {}

    def has_export(self, out: Path) -> bool:
        return (out / "config.json").is_file()


class LatentSubject(Subject):
    """A folder of latents that `latentvae encode` wrote, and changed copies of the latents.

    Args:
        folder: the folder.
        settings: settings of the proof.
        name: name of the folder in the results.
        data: the images that were encoded. With None, the images' path in the folder's
            manifest is used.
        model: the autoencoder. With None, the autoencoder in the folder's manifest is used.
    """

    kind = "latents"
    tunes_shift = True
    variants: ClassVar = {
        CODE: "the latents",
        "noise": "white noise is added to the latents",
        "labels": "the classes of the training images are shuffled",
        "blocks": "mean colours of pixel blocks, with about as many values as the latents",
        "permuted": "the positions of all latents are permuted in the same way",
    }

    def __init__(
        self,
        folder: str | Path,
        settings: ProofSettings,
        *,
        name: str,
        data: str | None = None,
        model: str | None = None,
    ) -> None:
        shards = LatentDataset(folder)
        table = joined([shards])
        super().__init__(shards, table, settings, name=name, data=data, model=model)
        self._data: dict[str, LatentData] = {}
        side = table.z.shape[3]
        self._patch = patch_for(side)
        cells = (side // self._patch) ** 2
        self._order = torch.randperm(cells, generator=torch.Generator().manual_seed(0))

    # the variants

    def data(self, variant: str) -> LatentData:
        """Return the latents of a variant (unchanged or with one of the changes in `variants`).

        The latents themselves are not normalised. The `normalization` of the result uses the
        measured mean and standard deviation of each channel.
        """
        if variant not in self._data:
            train, held = (self._changed(variant, part) for part in (0, 1))
            norm = measured_normalization(train, fold=1)
            shape = tuple(train.z.shape[1:])
            self._data[variant] = LatentData(
                train, held, self.content, "", norm, (shape[0], shape[1], shape[2])
            )
        return self._data[variant]

    def _changed(self, variant: str, part: int) -> LatentTable:
        """Return training latents (part 0) or held-out latents (part 1), changed by `variant`."""
        table = self.tables[part]
        draws = torch.Generator().manual_seed(part)
        table = dataclasses.replace(table, z=table.z.float())
        if variant == "noise":
            scale = self.settings.noise * self.tables[0].z.float().std(dim=(0, 2, 3))
            noise = torch.randn(table.z.shape, generator=draws) * scale.view(1, -1, 1, 1)
            return dataclasses.replace(table, z=table.z + noise)
        if variant == "labels" and part == 0:
            order = torch.randperm(len(table), generator=draws)
            return dataclasses.replace(table, classes=table.classes[order])
        if variant == "blocks":
            images = (self.train, self.held)[part].images
            return dataclasses.replace(table, z=self._blocks(images), stds=None)
        if variant == "permuted":
            stds = None if table.stds is None else self._moved(table.stds, self._order)
            return dataclasses.replace(table, z=self._moved(table.z, self._order), stds=stds)
        return table

    def _moved(self, z: Tensor, order: Tensor) -> Tensor:
        """Return latents whose square patches have a new order.

        A patch is a token of the generator.
        """
        side = z.shape[3] // self._patch
        pattern = "n d (y p) (x q) -> n d p q (y x)"
        cells = rearrange(z, pattern, p=self._patch, q=self._patch)[..., order]
        return rearrange(cells, "n d p q (y x) -> n d (y p) (x q)", y=side)

    def facts(self, export: Path) -> dict[str, float]:
        config: Any = DiTTransformer2DModel.load_config(export)
        channels = config["in_channels"]
        height, width = self.tables[0].z.shape[2:]
        return {**super().facts(export), "values": channels * height * width}

    def forget(self, variant: str) -> None:
        self._data.pop(variant, None)

    def _blocks(self, images: Tensor) -> Tensor:
        """Return mean colours of pixel blocks, (n, 3 k^2, h, w).

        Each latent position has k x k blocks. k is chosen so that the result has about as many
        values as the latents. For grey images, the result has k^2 channels instead of 3 k^2.
        """
        channels, height, width = self.tables[0].z.shape[1:]
        k = max(round((channels / images.shape[1]) ** 0.5), 1)
        means = F.adaptive_avg_pool2d(images, (k * height, k * width))
        return F.pixel_unshuffle(means, k)

    def decode(self, variant: str, z: Tensor) -> Tensor:
        """Turn latents (n, d, h, w) of a variant into pictures (n, C, H, W) in [-1, 1]."""
        if variant == "blocks":
            k = round((z.shape[1] / self.content.image_channels) ** 0.5)
            means = F.pixel_shuffle(z, k)
            images = F.interpolate(means, size=self.content.size, mode="bicubic", antialias=False)
            return images.clamp(-1, 1)
        if variant == "permuted":
            z = self._moved(z, torch.argsort(self._order))
        images: Any = self.autoencoder.decode(z, size=self.content.size)
        return images.clamp(-1, 1).cpu()

    # generators

    def task(self, variant: str, *, folder: Path, seed: int, shift: float) -> FlowTask:
        settings, data = self.settings, self.data(variant)
        flow = {
            "width": settings.width,
            "depth": settings.depth,
            "head_dim": HEAD_DIM,
            "shift": shift,
            "condition": "class" if self.num_classes else "none",
            "patch_size": patch_for(data.shape[1]),
        }
        options = {"flow": flow, **proof_run(settings, folder=folder, seed=seed)}
        return ProofFlow(LatentFlowConfig.model_validate(options), data)

    def sample(
        self,
        variant: str,
        generator: Path,
        classes: Tensor,
        *,
        shift: float,
        seed: int,
        guidance: float = 1.0,
    ) -> Iterator[Tensor]:
        net: Any = DiTTransformer2DModel.from_pretrained(generator, use_safetensors=True)
        net = net.to(self.autoencoder.net.device).eval()
        settings, norm = self.settings, self.data(variant).normalization
        options = FlowSampling(guidance, settings.sampling_steps)
        for numbers in batches(len(classes), settings.batch_size):
            chosen = classes[numbers.start : numbers.stop]
            drawn = sample_latents(
                net, chosen, options=options, shift=shift, seed=seed, numbers=numbers
            )
            yield self.decode(variant, norm.invert(drawn.cpu()))

    def reconstructed(self, *, held: bool) -> Iterator[Tensor]:
        z = self.tables[held].z.float()
        for numbers in batches(len(z), self.settings.batch_size):
            yield self.decode(CODE, z[numbers.start : numbers.stop])

    def untrained(self, classes: Tensor, *, seed: int) -> Iterator[Tensor]:
        """Decode noise, in batches.

        A new DiT predicts a velocity of 0, so its samples are the noise.
        """
        data = self.data(CODE)
        for numbers in batches(len(classes), self.settings.batch_size):
            noise = noise_of(data.shape, seed=seed, numbers=numbers)
            yield self.decode(CODE, data.normalization.invert(noise))


def patch_for(side: int) -> int:
    """Return a patch side so that a latent of side `side` has at most 256 tokens, if possible."""
    patch = 1
    while side // patch > 16 and side % (patch * 2) == 0:
        patch *= 2
    return patch


def parameters(settings: ProofSettings, *, channels: int, side: int, num_classes: int) -> int:
    """Return the number of parameters of the generator."""
    net = build_dit(
        channels=channels,
        side=side,
        num_classes=num_classes,
        width=settings.width,
        depth=settings.depth,
        head_dim=HEAD_DIM,
        patch_size=patch_for(side),
    )
    return sum(p.numel() for p in net.parameters())
