"""Export a prior as a diffusers pipeline, with its tokenizer inside and a model card."""

import math
from pathlib import Path
from typing import Any

import torch
import yaml

from latentvae.config.run_config import flat
from latentvae.engine.log import read_rows, sample_path
from latentvae.errors import UserError
from latentvae.export.card import public_value
from latentvae.export.export_folder import written_whole
from latentvae.latents.opening import open_model
from latentvae.option_marks import Private, marked
from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.sample import TOKENS_NAME
from latentvae.priors.text import check_exported_encoder, encode_prompts
from latentvae.priors.transformer import TokenTransformer
from latentvae.tasks.prior.config import PriorConfig
from latentvae.tasks.prior.tokens import TokenData

CARD = """---
library_name: diffusers
tags: [latentvae, autoregressive, image-generation, vq]
---

# {name}

An autoregressive prior over the tokens of a tokenizer, trained with latentvae. For an image, the
prior predicts {tokens} tokens, each one of {codes:,} codes. The prior has {millions} M parameters.
Condition: {condition}.

{samples}## Use

```python
from latentvae.priors import TokenPipeline

pipe = TokenPipeline.from_pretrained("path/to/this/folder")
pictures = pipe({example}).images
```

`latentvae sample path/to/this/folder --num 16 --out pictures` writes pictures.

## Metrics

| bits per token | value |
|---|---|
{rows}

The values are means over {images:,} unseen images after update {update:,}. Lower is better.

## Training

```yaml
{options}```
"""


SAMPLES = """![Samples](samples.png)

Random samples of this model, not selected by quality.

"""


def open_tokenizer(path: str | None, data: TokenData) -> Any:
    """Return the tokenizer that made the tokens.

    Args:
        path: the tokenizer's folder. None means the tokenizer named in the tokens' manifest.

    Raises:
        UserError: there is no such tokenizer, or the tokens were made with other weights.
    """
    try:
        tokenizer = open_model(path or data.model, device="cpu")
    except UserError as error:
        if path is not None:
            raise
        raise UserError(
            f"{error} (The manifest of the tokens names this tokenizer. Give another with "
            "--tokenizer.)"
        ) from error
    if tokenizer.info()["weights_sha256"] != data.content.model_sha256:
        raise UserError(
            f"tokenizer '{path or data.model}' has other weights than the tokenizer that made the "
            f"tokens ('{data.model}'). Give that tokenizer, or encode the images again."
        )
    return tokenizer


def export_prior(
    pipeline: TokenPipeline,
    out: Path,
    *,
    config: PriorConfig,
    data: TokenData,
    update: int,
    folder: Path,
) -> float | None:
    """Write the pipeline as a folder, and check that it loads with the same weights.

    Returns:
        The validation bits per token at `update`, or None without a validation at this update.

    Raises:
        RuntimeError: the loaded prior, text encoder or tokenizer differs from the original.
    """
    rows = [r for r in read_rows(folder / "log.jsonl") if "validation/bits_per_token" in r]
    row = next((r for r in rows if r["update"] == update), {})

    with written_whole(out) as part:
        pipeline.save_pretrained(part)
        (part / TOKENS_NAME).write_text(data.content.model_dump_json(indent=1) + "\n")
        grid = sample_path(folder, update)
        if grid.is_file():
            (part / "samples.png").write_bytes(grid.read_bytes())
        values = {"update": update, "name": folder.resolve().name, "samples": grid.is_file()}
        text = _card(pipeline, config, data, row, **values)
        (part / "README.md").write_text(text, encoding="utf-8")
        _check_equal(pipeline, part, data)
    return row.get("validation/bits_per_token")


def _check_equal(pipeline: TokenPipeline, folder: Path, data: TokenData) -> None:
    """Raise RuntimeError if the exported networks differ from the networks in `pipeline`."""
    # the weights that were trained
    ours, encoder, words = pipeline.transformer, pipeline.text_encoder, pipeline.tokenizer
    theirs: Any = TokenTransformer.from_pretrained(folder / "transformer", use_safetensors=True)
    pairs, loaded_encoder = [(ours, theirs)], encoder
    if encoder is not None and words is None:  # the encoder has learned with the prior
        place = folder / "text_encoder"
        loaded_encoder = ByteTextEncoder.from_pretrained(place, use_safetensors=True)
        pairs.append((encoder, loaded_encoder))
    elif encoder is not None:  # the encoder is frozen
        captions = data.validation.captions[:8]
        check_exported_encoder(folder, words, encoder, captions=captions)
    for trained, loaded in pairs:
        weights = loaded.to(ours.device).state_dict()
        for name, value in trained.state_dict().items():
            if not torch.equal(value, weights[name]):
                raise RuntimeError(f"the export's weight {name} differs from the trained weight")

    # their results
    indices, logits = data.validation.rows([0]).indices.to(ours.device), []
    with torch.no_grad():
        for net, reader in ((ours, encoder), (theirs, loaded_encoder)):
            captions = data.validation.captions[:1]
            text = None if reader is None else encode_prompts(captions, words, reader)
            logits.append(net(indices, text=text).logits)
    if not torch.allclose(*logits, atol=1e-4):
        raise RuntimeError("the export's logits differ from those of the trained prior")

    # the tokenizer
    loaded = open_model(folder / "vqvae", device="cpu")
    if loaded.info()["weights_sha256"] != data.content.model_sha256:
        raise RuntimeError("the export's tokenizer is not the tokenizer that made the tokens")


def _card(
    pipeline: TokenPipeline,
    config: PriorConfig,
    data: TokenData,
    row: dict[str, Any],
    *,
    update: int,
    name: str,
    samples: bool,
) -> str:
    net, private = pipeline.transformer, marked(PriorConfig, Private)
    names = {
        "validation/bits_per_token": "this prior (bits_per_token)",
        "validation/bits_wrong_class": "this prior, given a wrong class",
        "validation/bits_wrong_text": "this prior, given a wrong caption",
        "validation/bits_unigram": "codes by their frequencies (unigram)",
    }
    values = {words: row[key] for key, words in names.items() if key in row}
    values["equally likely codes"] = math.log2(net.config["num_codes"])

    classes = list(net.config["class_names"] or range(net.config["num_classes"]))
    condition = f"{len(classes)} classes" if classes else "text" if net.text else "none"
    options = {k: public_value(v) for k, v in flat(config).items() if k not in private}
    options["tokens"] = [public_value(folder) for folder in config.tokens.tokens]
    example = [repr(classes[0])] if classes else ['prompt="a photo"'] if net.text else []
    return CARD.format(
        name=name,
        samples=SAMPLES if samples else "",
        millions=f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}",
        tokens=net.num_tokens,
        codes=net.config["num_codes"],
        condition=condition,
        example=", ".join([*example, "num_images=4"]),
        rows="\n".join(f"| {words} | {value:.3f} |" for words, value in values.items()),
        images=len(data.validation),
        update=update,
        options=yaml.safe_dump(options, sort_keys=False),
    )
