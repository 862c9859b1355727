"""Define the task "prior": train a transformer to predict the tokens of images.

    export = engine.loop.train(PriorTask(config))

Symbols: `B` batch, `T` tokens of an image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentvae.autoencoder import hash_of_weights
from latentvae.distributed import barrier, gather_objects, is_main, rank, world_size
from latentvae.engine.task import Learner
from latentvae.errors import UserError
from latentvae.pictures import save_grid
from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.sampling import sample_tokens
from latentvae.priors.text import describe_encoder, encode_prompts, load_text_encoder
from latentvae.priors.transformer import NO_CLASS, Text, TokenTransformer, Words
from latentvae.tasks.generator_task import GeneratorTask
from latentvae.tasks.prior.config import BYTES, PriorConfig
from latentvae.tasks.prior.prior_export import export_prior, open_tokenizer
from latentvae.tasks.prior.tokens import (
    Batch,
    TokenData,
    TokenTable,
    mean_unigram_bits,
    open_tokens,
)
from latentvae.tasks.prior.trained_prior import TrainedPrior, token_bits
from latentvae.tasks.shards import check_captions, with_captions

PICTURE_BATCH = 40  # largest number of images that are sampled at once for a picture
WRONG = ("wrong_class", "wrong_text")
AnyText = TypeVar("AnyText", Text, Words)


class PriorTask(GeneratorTask):
    """Train a prior on the tokens of images.

    Attributes:
        data: tokens to train on and to validate on.
        tokenizer: the tokenizer that made the tokens.
        net: the transformer, not wrapped by DDP.
        condition: the condition that the prior gets with an image: "class", "text" or "none".
    """

    config: PriorConfig
    config_class = PriorConfig
    title, unit, shown = "Prior", "images", ("loss/bits_per_token",)
    launch = ("-m", "latentvae.cli.train_prior")

    # before the run

    def open(self) -> None:
        options = self.config.prior
        self.data = self.open_data()
        if options.captions is not None:
            self.data = with_captions(self.data, options.captions)
        self.tokenizer = self.open_tokenizer()
        self.condition = self._condition()
        self.words: Any = None
        self.encoder: Any = None
        if self.condition == "text":
            check_captions(
                self.data.train,
                self.data.validation,
                option="tokens",
                instead="give --condition none",
            )
            if not self.trains_text:
                self.words, self.encoder = load_text_encoder(options.text_encoder)
        elif options.text_encoder != BYTES:
            raise UserError(
                f"text_encoder '{options.text_encoder}' needs captions, but the tokens have none. "
                "Give --captions FILE, or leave text_encoder out."
            )
        self.unigram = mean_unigram_bits(self.data)

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder learns together with the prior."""
        return self.condition == "text" and self.config.prior.text_encoder == BYTES

    def open_data(self) -> TokenData:
        """Read the tokens to train on and to validate on."""
        return open_tokens(self.config.tokens, seed=self.config.run.seed)

    def open_tokenizer(self) -> Any:
        """Return the tokenizer that made the tokens."""
        return open_tokenizer(self.config.tokens.tokenizer, self.data)

    def _condition(self) -> str:
        """Return the kind of condition: class, text or none.

        The options and the tokens decide the kind.
        """
        asked = self.config.prior.condition
        has_classes = bool((self.data.train.classes != NO_CLASS).any())
        if asked == "auto":
            every = [*self.data.train.captions, *self.data.validation.captions]
            texts = all(every) or (any(every) and not has_classes)
            return "text" if texts else "class" if has_classes else "none"
        if asked == "class" and not has_classes:
            raise UserError(
                f"condition class needs tokens with classes, but '{self.config.tokens.tokens[0]}' "
                "has none. Give --condition none, or encode images that lie in one folder per "
                "class."
            )
        return asked

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        options, content = self.config.prior, self.data.content
        has_classes, text_channels = self.condition == "class", 0

        # networks
        if self.trains_text:
            self.encoder = ByteTextEncoder(dropout=options.dropout)
        if self.encoder is not None:
            self.encoder.to(accelerator.device)
            example = encode_prompts([self.data.train.captions[0]], self.words, self.encoder)
            text_channels = example.states.shape[2]
        self.net = TokenTransformer(
            num_codes=self.data.num_codes,
            levels=self.data.levels,
            item_shape=content.item_shape,
            num_classes=self.count_classes() if has_classes else 0,
            text_channels=text_channels,
            width=options.width,
            depth=options.depth,
            num_heads=options.num_heads,
            dropout=options.dropout,
            class_names=content.class_names if has_classes else None,
        )
        if self.config.run.gradient_checkpointing:
            self.net.enable_gradient_checkpointing()

        # what learns
        trained = TrainedPrior(self.net, self.encoder if self.trains_text else None)
        linear = [part for part in trained.blocks() if isinstance(part, nn.Linear)]
        learner = Learner.with_optimizer(
            trained,
            accelerator,
            self.config.optimizer,
            averaged=trained,
            matrices=[cast("nn.Parameter", part.weight) for part in linear],
        )
        self.learners = {"model": learner}

    def identity(self) -> dict[str, Any]:
        found = {"tokenizer": self.data.content.model_sha256[:16], **self.data.train.identity()}
        if self.condition == "text":
            found["captions"] = self.data.train.captions_hash()
            if not self.trains_text:
                found["text_encoder"] = hash_of_weights(self.encoder)[:16]
        return found

    def plan(self) -> dict[str, str]:
        size = sum(p.numel() for p in self.net.parameters())
        shape = " x ".join(map(str, self.data.content.item_shape))
        uniform = math.log2(self.data.num_codes)
        dropped = f"no condition for {self.config.prior.condition_dropout:.0%} of the images"
        kinds = {
            "class": f"{self.net.config['num_classes']} classes, {dropped}",
            "text": f"captions, {dropped}, {self._reader_of_texts()}",
            "none": "none",
        }
        return {
            "prior": f"TokenTransformer, {size / 1e6:.1f} M parameters",
            "tokens": (
                f"{shape} tokens of {self.data.num_codes:,} codes, {len(self.data.train):,} images "
                f"to train, {len(self.data.validation):,} to validate"
            ),
            "condition": kinds[self.condition],
            "to beat": (
                f"{uniform:.3f} bits per token if all codes were equally likely, "
                f"{self.unigram:.3f} with the codes' real frequencies"
            ),
        }

    def _reader_of_texts(self) -> str:
        """Return a description of the text encoder for the printed overview."""
        if self.encoder is None:
            return ""
        learns = "learns with the prior" if self.trains_text else "frozen"
        return f"read by {describe_encoder(self.encoder)}, {learns}"

    def warnings(self) -> list[str]:
        if self.condition != "none" and not self.config.prior.condition_dropout:
            return ["condition_dropout is 0, so sampling with guidance will not work."]
        return []

    # an update

    def micro_step(self, batch: Batch, update: int) -> dict[str, Tensor]:
        indices, classes, text = self.moved(batch, self.data.train, encode=not self.trains_text)
        classes, text = self.drop_condition(classes, text)
        loss = self.learners["model"].prepared(indices, classes, text)
        (loss / self.config.run.gradient_accumulation_steps).backward()
        return {"loss/bits_per_token": loss.detach() / math.log(2)}

    def moved(
        self, batch: Batch, table: TokenTable, *, encode: bool = True
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Return tokens, classes and text of a batch on the device.

        Classes are None unless the condition is "class". The text is None unless the condition is
        "text".

        Args:
            batch: rows of `table`.
            table: the table of tokens and captions that the batch comes from.
            encode: if true, the text encoder reads the captions, and its hidden states are returned
                (`Text`). If false, the captions are returned as bytes (`Words`), so that the
                encoder can learn from them.
        """
        indices = batch.indices.to(self.device)
        if self.condition != "text":
            known = self.condition == "class"
            return indices, batch.classes.to(self.device) if known else None, None
        prompts = [table.captions[number] for number in batch.numbers]
        return indices, None, self.states(prompts) if encode else self.encoder.split(prompts)

    def states(self, prompts: Sequence[str]) -> Text:
        """Return the text encoder's hidden states of prompts, without a gradient."""
        return encode_prompts(prompts, self.words, self.encoder)

    def drop_condition(
        self, classes: Tensor | None, text: AnyText | None
    ) -> tuple[Tensor | None, AnyText | None]:
        """Drop the class and text of some images, chosen by torch's global generator."""
        share = self.config.prior.condition_dropout
        if classes is not None:
            dropped = torch.rand(classes.shape, device=classes.device) < share
            classes = classes.masked_fill(dropped, NO_CLASS)
        if text is not None:
            dropped = torch.rand(len(text.mask), 1, device=text.mask.device) < share
            text = replace(text, mask=text.mask & ~dropped)
        return classes, text

    # between updates

    @torch.no_grad()
    def validate(self, update: int) -> dict[str, float]:
        # this rank's images
        table, step = self.data.validation, self.config.run.eval_batch_size
        mine = range(rank(), len(table), world_size())
        sums: dict[str, Tensor] = {}
        for start in range(0, len(mine), step):
            batch = table.rows(mine[start : start + step])
            for name, bits in self._bits(batch).items():
                bits = bits.cpu().double().sum(dim=0)
                sums[name] = sums[name] + bits if name in sums else bits

        # means over all ranks
        parts: list[dict[str, Tensor]] = [part for part in gather_objects(sums) if part]
        means = {
            name: torch.stack([part[name] for part in parts]).sum(dim=0) / len(table)
            for name in parts[0]
        }  # each (T,)
        values = {name: bits.mean().item() for name, bits in means.items()}
        return {
            "validation/bits_per_token": values["right"],
            **self._level_bits(means["right"]),
            **{f"validation/bits_{name}": values[name] for name in WRONG if name in values},
            "validation/bits_unigram": self.unigram,
            "validation/images": len(table),
        }

    def _bits(self, batch: Batch) -> dict[str, Tensor]:
        """Return the bits (B, T) of the tokens, with the right condition and with a wrong one.

        The bits of a token are -log2 of its predicted probability. If there are fewer than two
        classes or captions, there is no wrong condition.
        """
        indices, classes, text = self.moved(batch, self.data.validation)
        bits = {"right": token_bits(self.net, indices, classes, text)}
        if classes is not None and (count := self.net.config["num_classes"]) > 1:
            # Classes with near names are often similar, so the wrong class is half of all classes
            # away.
            wrong = (classes + count // 2) % count
            wrong = wrong.where(classes >= 0, NO_CLASS)
            bits["wrong_class"] = token_bits(self.net, indices, wrong, None)
        if text is not None and len(self.other_captions) > 1:
            prompts = [
                self.other_captions[self.data.validation.captions[number]]
                for number in batch.numbers
            ]
            bits["wrong_text"] = token_bits(self.net, indices, None, self.states(prompts))
        return bits

    def _level_bits(self, bits: Tensor) -> dict[str, float]:
        """Return the mean of `bits` (T,) in each level (token map), or {} for one level."""
        if len(self.net.level_sizes) == 1:
            return {}
        levels = enumerate(bits.split(self.net.level_sizes))
        return {f"validation/bits_level{i}": part.mean().item() for i, part in levels}

    def validation_line(self, values: Mapping[str, float]) -> str:
        named = {
            "a wrong class": values.get("validation/bits_wrong_class"),
            "a wrong caption": values.get("validation/bits_wrong_text"),
        }
        wrong = [f" ({bits:.3f} with {name})" for name, bits in named.items() if bits is not None]
        return (
            f"{values['validation/bits_per_token']:.3f} bits per token{''.join(wrong)}"
            f" on {values['validation/images']:,} unseen images"
        )

    def save_samples(self, path: Path) -> bool:
        """Draw a picture with equally many samples for each class or caption that it shows."""
        classes, captions, labels = self.sample_rows(self.net.config["num_classes"])
        pipeline = TokenPipeline(self.net, self.tokenizer.net.to(self.device))
        images = []
        for start in range(0, len(classes), PICTURE_BATCH):
            chosen = range(start, min(start + PICTURE_BATCH, len(classes)))
            text = None
            if captions:
                text = self.states([captions[number] for number in chosen])
            tokens = sample_tokens(
                self.net,
                classes[start : chosen.stop],
                text=text,
                seed=self.config.run.seed,
                numbers=chosen,
            )
            images.append(pipeline.decode(tokens).cpu())
        save_grid(torch.cat(images), path, labels=labels)
        return True

    # the end

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if is_main():
            pipeline = TokenPipeline(self.net, self.tokenizer.net, self.encoder, self.words)
            bits = export_prior(
                pipeline, out, config=self.config, data=self.data, update=update, folder=folder
            )
            values = {"export/bits_per_token": bits} if bits is not None else {}
        barrier()  # no process may end while the first one still writes
        return values

    # proofs

    @classmethod
    def shortened(cls, config: PriorConfig, *, updates: int) -> PriorConfig:
        few = {"max_validation_images": min(config.tokens.max_validation_images, 8)}
        return config.with_changes({"tokens": few, "run": {"num_sample_images": 1}})
