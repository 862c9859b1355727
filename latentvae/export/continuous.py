"""Write a trained autoencoder for diffusers, load it back, and check that it did not change.

    trained net -> temporary folder -> from_pretrained -> equal? -> folder renamed to `out`

The pipelines of diffusers use these values of the config before they decode latents:

- Stable Diffusion, SDXL, DiT and LDM divide latents by `scaling_factor` and ignore `shift_factor`.
- SD3 and FLUX also add `shift_factor`, and fail if it is null.
- SDXL uses `latents_mean` and `latents_std` if they are set (4 channels only).
- For SANA, `scaling_factor` is 1 / RMS instead of 1 / std, because the latents of AutoencoderDC lie
  around zero.
"""

import copy
import inspect
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentvae.compute.stock_layers import restore_stock_layers
from latentvae.errors import UserError, nearest
from latentvae.export.card import ModelCard, write_card
from latentvae.export.export_folder import check_folder, load_back, probes, written_whole
from latentvae.export.export_report import PROFILES, ExportReport, Profile
from latentvae.export.half_precision import check_half_precision
from latentvae.export.tiles import fitting_sample_size, misfit_of_tiles
from latentvae.latents import LatentStatistics
from latentvae.models import Network, family_of
from latentvae.models.calls import decode, encode_posterior


def export_autoencoder(
    net: Network,
    out: Path,
    *,
    statistics: LatentStatistics,
    sample_size: int,
    probe: Tensor,
    profile: Profile = "sd",
    card: ModelCard | None = None,
    frozen_encoder: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Export `net` to the folder `out`, so that diffusers can load the network.

    The folder appears only if the network that diffusers loads computes exactly the same as `net`.

    Args:
        net: the trained network, which has continuous latents. Use the averaged weights if the
            training averaged them. This function does not change the network.
        statistics: statistics of posterior samples of this network, see `latentvae.latents`.
        sample_size: longer side of the training images in pixels. diffusers derives tiles from the
            config's `sample_size`. So the export writes the smallest `sample_size` that is at least
            the longer side of the training images and gives tiles that fit together.
        probe: real images (B, C, H, W) in [-1, 1] for the float16 check. On the first image, the
            export is compared with `net`, at the image's own size and at a slightly larger size.
        profile: `"sd"` works in every pipeline. `"sd3"` (also for FLUX) writes the measured shift.
            `"sdxl"` writes mean and std per channel. Only `AutoencoderKL` supports `"sd3"` and
            `"sdxl"`.
        frozen_encoder: keep the scale and shift of the pretrained network, because its encoder was
            not trained and gives the same latents as before.
        overwrite: replace an earlier export.

    Raises:
        UserError: an option does not fit the network, or `out` exists and may not be replaced.
        RuntimeError: the network that diffusers loads back differs from the trained network, or
            does not work in tiles.
    """
    # measure
    _check_options(net, out, profile=profile, overwrite=overwrite)
    trained = _on_cpu(net)
    probe = probe.to("cpu", torch.float32)
    half = check_half_precision(trained, probe)
    identity = not half.safe and getattr(trained, "post_quant_conv", trained) is None
    config = _exported_config(trained, statistics, profile=profile, frozen_encoder=frozen_encoder)
    tile = fitting_sample_size(trained, int(sample_size))
    config |= _known(trained, {"sample_size": tile, "force_upcast": not half.safe})

    # report
    report = ExportReport(
        path=out,
        network=type(trained).__name__,
        has_posterior=bool(family_of(trained).has_posterior),
        latent_channels=config["latent_channels"],
        profile=profile,
        num_images=statistics.num_images,
        old_scaling_factor=net.config["scaling_factor"],
        old_shift_factor=net.config.get("shift_factor"),
        old_is_default=_is_default(net, "scaling_factor"),
        measured_scaling_factor=_scale(trained, statistics, profile="sd")["scaling_factor"],
        scaling_factor=config["scaling_factor"],
        shift_factor=config.get("shift_factor", 0.0),
        half_precision=half,
        has_force_upcast="force_upcast" in _options(trained),
        identity_post_quant_conv=identity,
        compared_sizes=tuple((p.shape[2], p.shape[3]) for p in probes(trained, probe)),
    )

    # write, load back, compare
    with written_whole(out) as folder:
        written = _build(trained, config, identity=identity)
        written.save_pretrained(folder)
        loaded = load_back(folder, type(trained))
        _compare(trained, loaded, probe)
        if misfit := misfit_of_tiles(loaded, f=family_of(loaded).latent_shape(loaded).f):
            raise RuntimeError(f"the exported network does not work in tiles: {misfit}")
        card = card or ModelCard(name=out.name)
        card = replace(card, resolution=card.resolution or str(sample_size))
        write_card(card, folder, net=written, config=config, report=report)
    return report


def _on_cpu(net: Network) -> Any:
    """Return a float32 copy of `net` that computes exactly like an export loaded by diffusers.

    The copy has contiguous weights (as in a file), the layers of diffusers in place of the faster
    layers of training, and no tiling.
    """
    copied: Any = copy.deepcopy(net).cpu().float().to(memory_format=torch.contiguous_format)
    restore_stock_layers(copied)
    if hasattr(copied, "disable_tiling"):
        copied.disable_tiling()
    return copied.eval()


def _check_options(net: Network, out: Path, *, profile: str, overwrite: bool) -> None:
    if profile not in PROFILES:
        hint = nearest(profile, PROFILES)
        raise UserError(f"export profile must be sd, sd3 or sdxl (got '{profile}'){hint}")
    if lacking := [name for name in _WRITTEN[profile] if name not in _options(net)]:
        raise UserError(
            f"export profile '{profile}' writes {' and '.join(lacking)}, which "
            f"{type(net).__name__} does not have. Use profile 'sd'."
        )
    if profile == "sdxl" and net.config["latent_channels"] != 4:
        channels = net.config["latent_channels"]
        raise UserError(
            f"export profile 'sdxl' needs 4 latent channels (got {channels}). Use profile 'sd'."
        )
    check_folder(out, overwrite=overwrite)


# Options that each profile writes besides `scaling_factor`, which all profiles write.
_WRITTEN: dict[str, tuple[str, ...]] = {
    "sd": (),
    "sd3": ("shift_factor",),
    "sdxl": ("latents_mean", "latents_std"),
}


def _exported_config(
    net: Network, statistics: LatentStatistics, *, profile: Profile, frozen_encoder: bool
) -> dict[str, Any]:
    """Return the network's config, with the new scale unless the encoder was frozen.

    Keys that begin with `_` are left out, because they describe the loaded file, such as its path.
    """
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    if frozen_encoder:
        return config | _known(net, {"shift_factor": config.get("shift_factor") or 0.0})
    return config | _known(net, _scale(net, statistics, profile=profile))


def _known(net: Network, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the values that are options of the network's class.

    A config may hold other values, which the class sets by itself.
    """
    return {key: value for key, value in values.items() if key in _options(net)}


def _is_default(net: Network, name: str) -> bool:
    return inspect.signature(type(net).__init__).parameters[name].default == net.config[name]


def _options(net: Network) -> Collection[str]:
    """Return the names of the options that the network's class takes."""
    return inspect.signature(type(net).__init__).parameters.keys()


def _scale(net: Network, statistics: LatentStatistics, *, profile: Profile) -> dict[str, Any]:
    scale = {
        "scaling_factor": statistics.scaling_factor,
        "shift_factor": 0.0,
        "latents_mean": None,
        "latents_std": None,
    }
    if family_of(net).scaled_by == "rms":  # AutoencoderDC, for SANA (arXiv:2410.10733)
        return scale | {"scaling_factor": 1.0 / statistics.rms}
    if profile == "sd3":
        return scale | {"shift_factor": statistics.shift_factor}
    if profile == "sdxl":
        mean, std = statistics.channel_mean.tolist(), statistics.channel_std.tolist()
        return scale | {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}
    return scale


def _build(trained: Network, config: Mapping[str, Any], *, identity: bool) -> Any:
    """Return a new network with the exported config and the trained weights.

    The network is built on the meta device, so that no random numbers are drawn.
    """
    weights = trained.state_dict()
    if identity:
        d = config["latent_channels"]
        weights["post_quant_conv.weight"] = torch.eye(d)[:, :, None, None]  # (d, d, 1, 1)
        weights["post_quant_conv.bias"] = torch.zeros(d)
        config = {**config, "use_post_quant_conv": True}
    network: Any = type(trained)
    with torch.device("meta"):
        net = network.from_config(_known(trained, config))
    net.load_state_dict(weights, assign=True)
    return net.eval()


@torch.no_grad()
def _compare(trained: Network, loaded: Network, probe: Tensor) -> None:
    for images in probes(trained, probe):
        mean, logvar = encode_posterior(trained, images)
        for ours, theirs in zip((mean, logvar), encode_posterior(loaded, images), strict=True):
            if ours is not None and theirs is not None and not torch.equal(ours, theirs):
                raise RuntimeError(_difference("encoder", images, ours, theirs))
        ours, theirs = decode(trained, mean), decode(loaded, mean)
        if not torch.equal(ours, theirs):
            raise RuntimeError(_difference("decoder", images, ours, theirs))


def _difference(part: str, images: Tensor, ours: Tensor, theirs: Tensor) -> str:
    size = " x ".join(map(str, images.shape[2:]))
    largest = (ours - theirs).abs().max().item()
    return (
        f"the exported {part} differs from the trained one at {size} pixels by up to {largest:g}."
    )
