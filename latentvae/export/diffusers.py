"""Write a trained autoencoder as diffusers reads it, load it back, and compare.

    trained net -> temporary folder -> its class's from_pretrained -> equal? -> renamed into place

The config's values follow from how the pipelines read them: Stable Diffusion, SDXL, DiT and LDM
divide by `scaling_factor` and ignore `shift_factor`; SD3 and FLUX add `shift_factor` and fail if
it is null; SDXL uses `latents_mean` and `latents_std` where they are set (4 channels alone);
SANA, with AutoencoderDC's latents about zero, multiplies by `scaling_factor`, 1 / RMS.
"""

import copy
import inspect
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.compute.stock_layers import restore_stock_layers
from latentvae.errors import UserError, nearest
from latentvae.export.card import ModelCard, write_card
from latentvae.export.half_precision import check_half_precision
from latentvae.export.report import PROFILES, ExportReport, Profile
from latentvae.latents import LatentStatistics
from latentvae.models.calls import decode, encode_posterior

CLASSES = (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderDC)


def export_autoencoder(
    net: Any,
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
    """Export `net` to the folder `out`; nothing appears there unless it equals the trained network.

    Args:
        net: the trained network (the averaged weights, where there are such), of one of `CLASSES`;
            it is not changed.
        statistics: of posterior samples of this network, see `latentvae.latents`.
        sample_size: side of the training images in pixels; diffusers' tiling goes by it.
        probe: real images (B, C, H, W) in [-1, 1] for the float16 check; the
            first is compared, at its size and at an odd one.
        profile: `"sd"` serves every pipeline; `"sd3"` (FLUX too) writes the measured shift;
            `"sdxl"` writes mean and std per channel. Both are for `AutoencoderKL`: the other
            classes have no such options.
        frozen_encoder: the latents are the base model's, so its scale and shift are kept.
        overwrite: replace an earlier export.

    Raises:
        UserError: an option that cannot be, or a folder that is in the way.
        RuntimeError: what diffusers loads back is not what was trained.
    """
    _check_options(net, out, profile=profile, overwrite=overwrite)
    trained = _on_cpu(net)
    probe = probe.to("cpu", torch.float32)
    half = check_half_precision(trained, probe)
    identity = not half.safe and getattr(trained, "post_quant_conv", trained) is None
    config = _exported_config(trained, statistics, profile=profile, frozen_encoder=frozen_encoder)
    config |= _known(trained, {"sample_size": int(sample_size), "force_upcast": not half.safe})
    report = ExportReport(
        path=out,
        network=type(trained).__name__,
        latent_channels=config["latent_channels"],
        profile=profile,
        num_images=statistics.num_images,
        old_scaling_factor=net.config["scaling_factor"],
        old_shift_factor=net.config.get("shift_factor"),
        measured_scaling_factor=_scale(trained, statistics, profile="sd")["scaling_factor"],
        scaling_factor=config["scaling_factor"],
        shift_factor=config.get("shift_factor", 0.0),
        half_precision=half,
        has_force_upcast="force_upcast" in _options(trained),
        identity_post_quant_conv=identity,
        compared_sizes=tuple((p.shape[2], p.shape[3]) for p in probes(trained, probe)),
    )
    with written_whole(out) as folder:
        _build(trained, config, identity=identity).save_pretrained(folder)
        _compare(trained, load_back(folder, type(trained)), probe)
        write_card(card or ModelCard(name=out.name), folder, config=config, report=report)
    return report


def _on_cpu(net: nn.Module) -> Any:
    """A float32 copy, contiguous (as a file is), without tiling and with the stock layers that
    load the export: what is proved equal is the trained weights' plain forward pass."""
    copied: Any = copy.deepcopy(net).cpu().float().to(memory_format=torch.contiguous_format)
    assert type(copied) in CLASSES
    restore_stock_layers(copied)
    if hasattr(copied, "disable_tiling"):
        copied.disable_tiling()
    return copied.eval()


def _check_options(net: Any, out: Path, *, profile: str, overwrite: bool) -> None:
    if profile not in PROFILES:
        hint = nearest(profile, PROFILES)
        raise UserError(f"no export profile '{profile}': it must be sd, sd3 or sdxl{hint}")
    if lacking := [name for name in _WRITTEN[profile] if name not in _options(net)]:
        raise UserError(
            f"export profile '{profile}' writes {' and '.join(lacking)}, which "
            f"{type(net).__name__} does not have; take 'sd'"
        )
    if profile == "sdxl" and net.config["latent_channels"] != 4:
        channels = net.config["latent_channels"]
        raise UserError(f"export profile 'sdxl' needs 4 latent channels, not {channels}; take 'sd'")
    check_folder(out, overwrite=overwrite)


_WRITTEN: dict[str, tuple[str, ...]] = {  # by profile, beside the scaling_factor that all have
    "sd": (),
    "sd3": ("shift_factor",),
    "sdxl": ("latents_mean", "latents_std"),
}


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Refuse what is no export, and an export that is not to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_export(out):
        raise UserError(f"'{out}' exists and is not an export; name another folder")
    if not overwrite:
        raise UserError(f"'{out}' holds an export; name another folder, or ask to overwrite it")


def is_export(folder: Path) -> bool:
    """Whether a folder's config.json names a network that is exported here."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = {*(cls.__name__ for cls in CLASSES), "VQModel", "DiscreteAutoencoder"}
    return isinstance(config, dict) and config.get("_class_name") in names


def _exported_config(
    net: Any, statistics: LatentStatistics, *, profile: Profile, frozen_encoder: bool
) -> dict[str, Any]:
    """The network's own config (without private keys, which hold paths), and the scale."""
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    if frozen_encoder:
        return config | _known(net, {"shift_factor": config.get("shift_factor") or 0.0})
    return config | _known(net, _scale(net, statistics, profile=profile))


def _known(net: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the network's class takes; a config may hold others, which it sets
    by itself."""
    return {key: value for key, value in values.items() if key in _options(net)}


def _options(net: Any) -> Collection[str]:
    """What the network's class takes."""
    return inspect.signature(type(net).__init__).parameters.keys()


def _scale(net: Any, statistics: LatentStatistics, *, profile: Profile) -> dict[str, Any]:
    scale = {
        "scaling_factor": statistics.scaling_factor,
        "shift_factor": 0.0,
        "latents_mean": None,
        "latents_std": None,
    }
    if isinstance(net, AutoencoderDC):
        return scale | {
            "scaling_factor": 1.0 / statistics.rms
        }  # arXiv:2410.10733, as SANA reads it
    if profile == "sd3":
        return scale | {"shift_factor": statistics.shift_factor}
    if profile == "sdxl":
        mean, std = statistics.channel_mean.tolist(), statistics.channel_std.tolist()
        return scale | {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}
    return scale


def _build(trained: Any, config: Mapping[str, Any], *, identity: bool) -> Any:
    """The same weights under the exported config; no random numbers are drawn on the way."""
    weights = trained.state_dict()
    if identity:
        d = config["latent_channels"]
        weights["post_quant_conv.weight"] = torch.eye(d)[:, :, None, None]  # (d, d, 1, 1)
        weights["post_quant_conv.bias"] = torch.zeros(d)
        config = {**config, "use_post_quant_conv": True}
    with torch.device("meta"):
        net: Any = type(trained).from_config(_known(trained, config))
    net.load_state_dict(weights, assign=True)
    return net.eval()


def load_back(folder: Path, cls: type[Any]) -> Any:
    """What `cls` loads from an export, whole or not at all; on the CPU, in eval mode."""
    net, info = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise RuntimeError(f"the export is not loaded whole: {problems}")
    return copy.deepcopy(net)  # out of the file's memory map, whose alignment can change sums


@torch.no_grad()
def _compare(trained: Any, loaded: Any, probe: Tensor) -> None:
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
    return f"the exported {part} differs from the trained one at {size} pixels by up to {largest:g}"


def probes(net: Any, probe: Tensor) -> tuple[Tensor, Tensor]:
    """The first image, and it at another size: one that f does not divide, where the network takes
    such."""
    f = net.spatial_compression_ratio if isinstance(net, AutoencoderDC) else 0
    more = (0, f, 0, 0) if f else (0, 3, 0, 1)
    return probe[:1], F.pad(probe[:1], more, mode="replicate")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or disappears."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.writing-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # by the umask, unlike tempfile's
    try:
        yield folder
        _settle(folder)
        _swap(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give every file the umask's mode (safetensors writes 0600) and bring it to the disk."""
    mode = (folder / "README.md").stat().st_mode & 0o777
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _swap(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an earlier `out` goes only when the new one stands."""
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
