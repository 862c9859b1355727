"""The presets' configurations with tiny networks."""

from typing import Any

from latentvae.models.table import MODELS
from latentvae.tasks.autoencoder.config import TrainConfig, load_preset, parse

# Only options that a preset's section has are replaced. Lengths and kinds stay the preset's own.
_MODEL: dict[str, Any] = {
    "block_out_channels": lambda widths: [8] * len(widths),
    "up_block_out_channels": [8, 16, 32, 32],
    "layers_per_block": 1,
    "layers_per_up_block": 1,
    "encoder_layers_per_block": lambda layers: [1] * len(layers),
    "decoder_layers_per_block": lambda layers: [1] * len(layers),
    "encoder_channels": 8,
    "encoder_blocks": 1,
    "decoder_channels": 8,
    "decoder_blocks": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "pretrained_model_name_or_path": None,
    "pretrained_family": None,
    "variant": None,
    "freeze_encoder": False,
}
_QUANTIZER: dict[str, Any] = {
    "num_codes": 16,
    "code_channels": 4,
    "num_bits": 4,
    "levels": [3, 5],
    "num_levels": 2,
}


def tiny_preset(name: str, **changes: dict[str, Any]) -> TrainConfig:
    """The preset ``name`` with a network of few weights.

    Args:
        changes: other options, by section; "quantizer" is a section too.
    """
    preset = load_preset(name)
    values = preset.model_dump(mode="json", exclude={"config"})
    model = values["model"]
    _replace(model, _MODEL)
    _replace(model.get("quantizer", {}), _QUANTIZER)
    values["data"]["resolution"] = 2 * MODELS[model["architecture"]].model_validate(model).f
    for section, options in changes.items():
        (model if section == "quantizer" else values)[section] |= options
    return parse(values, source=name)


def _replace(values: dict[str, Any], tiny: dict[str, Any]) -> None:
    for name in values.keys() & tiny.keys():
        values[name] = tiny[name](values[name]) if callable(tiny[name]) else tiny[name]
