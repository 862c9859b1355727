"""Prepare tokens for `latentvae prove`. The generator is an autoregressive transformer.

Symbols: `n` images, `T` tokens per image.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentvae.latents.shard_dataset import TokenDataset
from latentvae.models import calls
from latentvae.priors.sampling import Sampling, sample_tokens
from latentvae.priors.transformer import TokenTransformer
from latentvae.proofs.generator_proof.settings import ProofSettings
from latentvae.proofs.generator_proof.subject import (
    CODE,
    Subject,
    batches,
    proof_run,
)
from latentvae.tasks.prior.config import PriorConfig
from latentvae.tasks.prior.task import PriorTask
from latentvae.tasks.prior.tokens import TokenData, TokenTable, joined, levels_of

HEAD_DIM = 32


class ProofPrior(PriorTask):
    """Train a generator of `latentvae prove` on given tokens. The training draws no pictures.

    Args:
        config: options of the run.
        data: the tokens.
    """

    def __init__(self, config: PriorConfig, data: TokenData) -> None:
        super().__init__(config)
        self._given = data

    def open_data(self) -> TokenData:
        return self._given

    def open_tokenizer(self) -> None:
        return None

    def save_samples(self, path: Path) -> bool:
        return False

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        self.net.save_pretrained(out)
        return {}

    def has_export(self, out: Path) -> bool:
        return (out / "config.json").is_file()


class TokenSubject(Subject):
    """A folder of tokens that `latentvae encode` wrote, and changed copies of the tokens.

    Args:
        folder: the folder.
        settings: settings of the proof.
        name: name of the folder in the results.
        data: the images that were encoded. With None, the images' path in the folder's
            manifest is used.
        model: the tokenizer. With None, the tokenizer in the folder's manifest is used.
    """

    kind = "tokens"
    variants: ClassVar = {
        CODE: "the tokens",
        "noise": "a share of the tokens is replaced by random tokens",
        "labels": "the classes of the training images are shuffled",
        "shuffled": "the tokens are shuffled, in a different order for each image",
        "permuted": "the positions of all tokens are permuted in the same way",
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
        shards = TokenDataset(folder)
        super().__init__(shards, joined([shards]), settings, name=name, data=data, model=model)
        self.levels, self.num_codes = levels_of(shards.content), shards.num_codes
        self._data: dict[str, TokenData] = {}
        draws, orders, start = torch.Generator().manual_seed(0), list[Tensor](), 0
        for size in self._sizes:
            orders.append(start + torch.randperm(size, generator=draws))
            start += size
        self._order = torch.cat(orders)  # a permutation within each level (token map)

    @property
    def _sizes(self) -> list[int]:
        return [height * width for height, width in self.levels]

    # the variants

    def data(self, variant: str) -> TokenData:
        """Return the tokens of a variant (unchanged or with one of the changes in `variants`)."""
        if variant not in self._data:
            train, held = (self._changed(variant, part) for part in (0, 1))
            self._data[variant] = TokenData(
                train, held, self.content, "", self.levels, self.num_codes
            )
        return self._data[variant]

    def _changed(self, variant: str, part: int) -> TokenTable:
        """Return training tokens (part 0) or held-out tokens (part 1) with the change `variant`."""
        table = self.tables[part]
        draws = torch.Generator().manual_seed(part)
        if variant == "noise":
            shape = table.sequences.shape
            other = torch.randint(self.num_codes, shape, generator=draws)
            chosen = torch.rand(shape, generator=draws) < self.settings.noise
            tokens = torch.where(chosen, other, table.sequences.long())
            return dataclasses.replace(table, sequences=tokens.to(torch.int32))
        if variant == "labels" and part == 0:
            order = torch.randperm(len(table), generator=draws)
            return dataclasses.replace(table, classes=table.classes[order])
        if variant == "shuffled":
            return table.shuffled(part, level_sizes=self._sizes)
        if variant == "permuted":
            tokens = table.sequences.to(torch.int32)[:, self._order]
            return dataclasses.replace(table, sequences=tokens)
        return table

    def forget(self, variant: str) -> None:
        self._data.pop(variant, None)

    @torch.inference_mode()
    def decode(self, variant: str, tokens: Tensor) -> Tensor:
        """Decode tokens (n, T) of a variant to pictures (n, C, H, W) in [-1, 1]."""
        if variant == "permuted":
            tokens = tokens[:, torch.argsort(self._order)]
        device: torch.device = self.autoencoder.net.device
        items = tokens.long().reshape(len(tokens), *self.content.item_shape)
        images = calls.decode_indices(self.autoencoder.net, items.to(device))
        height, width = self.content.size
        return images.float().clamp(-1, 1)[:, :, :height, :width].cpu()

    # generators

    def task(self, variant: str, *, folder: Path, seed: int, shift: float) -> PriorTask:
        settings = self.settings
        prior = {
            "width": settings.width,
            "depth": settings.depth,
            "num_heads": max(settings.width // HEAD_DIM, 1),
            "condition": "class" if self.num_classes else "none",
        }
        options = {"prior": prior, **proof_run(settings, folder=folder, seed=seed)}
        return ProofPrior(PriorConfig.model_validate(options), self.data(variant))

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
        net: Any = TokenTransformer.from_pretrained(generator, use_safetensors=True)
        net = net.to(self.autoencoder.net.device).eval()
        sampling = Sampling(guidance)
        for numbers in batches(len(classes), self.settings.batch_size):
            drawn = sample_tokens(
                net,
                classes[numbers.start : numbers.stop],
                options=sampling,
                seed=seed,
                numbers=numbers,
            )
            yield self.decode(variant, drawn.cpu())

    def reconstructed(self, *, held: bool) -> Iterator[Tensor]:
        tokens = self.tables[held].sequences
        for numbers in batches(len(tokens), self.settings.batch_size):
            yield self.decode(CODE, tokens[numbers.start : numbers.stop])

    def untrained(self, classes: Tensor, *, seed: int) -> Iterator[Tensor]:
        """Decode random tokens: an untrained transformer gives all codes equal probability."""
        draws = torch.Generator().manual_seed(seed)
        for numbers in batches(len(classes), self.settings.batch_size):
            shape = (len(numbers), sum(self._sizes))
            yield self.decode(CODE, torch.randint(self.num_codes, shape, generator=draws))
