"""Use an autoencoder: any `AutoencoderKL` folder, any image size, PIL, NumPy or torch images.

    model = latentvae.load("runs/demo/export")
    z = model.encode(Image.open("photo.jpg"))  # (1, d, ceil(H / f), ceil(W / f))
    picture = model.decode(z, size=(H, W), output_type="pil")[0]

`B` batch, `C` channels, `H W` pixels, `f` downsampling factor, `d` latent channels.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from latentvae.errors import UserError, nearest
from latentvae.models import downsampling_factor
from latentvae.pictures import Images, OutputType, convert, read_pictures

AnyImages = TypeVar("AnyImages", bound=Images)

_GENERIC_NAMES = ("export", "vae")  # folders that say nothing: their parent's name does


class Autoencoder:
    """A network in eval mode, with frozen weights, behind calls that take pictures.

    Images of any size are padded at the right and at the bottom to a multiple of f (reflected, or
    replicated where too small) and cropped back. What comes back as a tensor is an ordinary one:
    a generator can be trained on it.

    Args:
        net: on the device and in the dtype to work in.
        name: what reports call it.
    """

    def __init__(self, net: AutoencoderKL, *, name: str) -> None:
        self.net = net.eval().requires_grad_(False)
        self.name = name
        self.f = downsampling_factor(net)
        self.latent_channels: int = net.config["latent_channels"]
        self.scaling_factor: float = net.config["scaling_factor"]
        self.shift_factor: float = net.config["shift_factor"] or 0.0

    def encode(
        self,
        images: Images,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        scaled: bool = False,
    ) -> Tensor:
        """Latents (B, d, ceil(H / f), ceil(W / f)) on the network's device, in its dtype.

        Args:
            images: PIL image(s) of one size, NumPy (B, H, W, 3) or (H, W, 3), uint8 or in [0, 1],
                or torch (B, C, H, W) in [-1, 1].
            sample: draw from the posterior with `generator`, instead of taking its mode.
            scaled: as a diffusion model sees them: shifted and scaled to about unit variance.
        """
        return self._encode(read_pictures(images)[0], sample, generator, scaled).clone()

    def decode(
        self,
        z: Tensor,
        *,
        size: tuple[int, int] | None = None,
        scaled: bool = False,
        output_type: OutputType = "pt",
    ) -> Images:
        """Images of latents (B, d, h, w).

        Args:
            size: (H, W) to crop to, from the top left; None keeps f * h by f * w.
            scaled: the latents are as `encode(..., scaled=True)` gives them.
            output_type: `"pt"` (B, C, H, W) float32 in [-1, 1], `"np"` (B, H, W, C) float32 in
                [0, 1], or `"pil"`, a list.
        """
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            expected = f"(B, {self.latent_channels}, h, w)"
            raise UserError(f"latents of '{self.name}' are {expected}, not {tuple(z.shape)}")
        return convert(self._decode(z, size, scaled).clone(), output_type)

    def reconstruct(self, images: AnyImages) -> AnyImages:
        """Encode (the mode) and decode; gives back the kind, dtype and size that was given.

        A list may hold PIL images of different sizes. Tensors come back clamped to [-1, 1].
        """
        if isinstance(images, Sequence) and len({i.size for i in images}) > 1:
            return cast(AnyImages, [self.reconstruct(image) for image in images])
        batch, kind = read_pictures(images)
        z = self._encode(batch, False, None, False)
        recon = self._decode(z, (batch.shape[2], batch.shape[3]), False).clone()
        if isinstance(images, Tensor):
            recon = recon.to(images.device)
        return cast(AnyImages, kind.restore(recon))

    def info(self) -> dict[str, Any]:
        """What a report needs to tell this model from others."""
        return {
            "class": type(self.net).__name__,
            "f": self.f,
            "latent_channels": self.latent_channels,
            "num_parameters": sum(value.numel() for value in self.net.parameters()),
            "dtype": str(self.net.dtype).removeprefix("torch."),
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "sample_size": self.net.config["sample_size"],
            "weights_sha256": _sha256(self.net),
        }

    @torch.inference_mode()
    def _encode(
        self, images: Tensor, sample: bool, generator: torch.Generator | None, scaled: bool
    ) -> Tensor:
        if images.shape[1] != self.net.config["in_channels"]:
            channels = self.net.config["in_channels"]
            raise UserError(f"'{self.name}' takes {channels}-channel images, not {images.shape[1]}")
        images = pad_to_multiple(images.to(self.net.device), self.f).to(self.net.dtype)
        net: Any = self.net
        posterior = net.encode(images).latent_dist
        z = posterior.sample(generator) if sample else posterior.mode()
        if not scaled:
            return z
        shift, scale = self._shift_and_scale(z)
        return (z - shift) * scale

    @torch.inference_mode()
    def _decode(self, z: Tensor, size: tuple[int, int] | None, scaled: bool) -> Tensor:
        net: Any = self.net
        z = z.to(net.device, net.dtype)
        if scaled:
            shift, scale = self._shift_and_scale(z)
            z = z / scale + shift
        images: Tensor = net.decode(z).sample.float()
        height, width = size or images.shape[2:]
        if not (0 < height <= images.shape[2] and 0 < width <= images.shape[3]):
            decoded = f"{images.shape[2]} x {images.shape[3]}"
            raise UserError(f"these latents decode to {decoded} pixels, not to {height} x {width}")
        if not images.isfinite().all():
            raise RuntimeError(
                f"'{self.name}' overflows in {self.net.dtype}: use bfloat16, float32"
            )
        return images[:, :, :height, :width].clamp(-1.0, 1.0)

    def _shift_and_scale(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is subtracted and multiplied; per channel where the config says so, as for SDXL."""
        mean, std = self.net.config["latents_mean"], self.net.config["latents_std"]
        if mean is None or std is None:
            return self.shift_factor, self.scaling_factor
        return _channels(mean, z), self.scaling_factor / _channels(std, z)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Autoencoder:
    """Open an `AutoencoderKL` folder: an export of latentvae or any other, as safetensors.

    Args:
        path: the folder with config.json and the weights; nothing is downloaded.
        device: None is the CPU, as in diffusers.
        dtype: None is float32; float16 may overflow unless the config's `force_upcast` is false.

    Raises:
        UserError: no such folder, another kind of model, or damaged weights.
    """
    path = Path(path)
    _check_folder(path)
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            path,
            torch_dtype=dtype or torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the weights in '{path}': {_first_line(error)}") from error
    net, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            keys = f"{kind.replace('_', ' ')} ({len(loading[kind])}, first {loading[kind][0]})"
            raise UserError(f"the weights in '{path}' do not fit its config.json: {keys}")
    return Autoencoder(net.to(device or "cpu"), name=_name(path))


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the right and the bottom until `multiple` divides both sides."""
    height, width = images.shape[2:]
    right, bottom = -width % multiple, -height % multiple
    if not right and not bottom:
        return images
    mode = "reflect" if right < width and bottom < height else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode)


def _check_folder(path: Path) -> None:
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        hint = nearest(path.name, (sibling.name for sibling in siblings))
        raise UserError(f"no such model folder '{path}'{hint}")
    if not path.is_dir():
        raise UserError(f"'{path}' is a file; give the folder with config.json and the weights")
    config = path / "config.json"
    if not config.is_file():
        inner = next((p for p in ("export", "vae") if (path / p / "config.json").is_file()), None)
        hint = f"; did you mean '{path / inner}'?" if inner else ""
        raise UserError(f"'{path}' holds no config.json, so it is no model folder{hint}")
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{config}' is not the config of a diffusers model") from error
    if name != "AutoencoderKL":
        raise UserError(f"'{path}' holds a {name}; only an AutoencoderKL can be loaded")


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name in _GENERIC_NAMES and path.parent.name else path.name


def _channels(values: Sequence[float], z: Tensor) -> Tensor:
    """(1, d, 1, 1)."""
    return torch.tensor(values, dtype=z.dtype, device=z.device).view(1, -1, 1, 1)


def _sha256(net: AutoencoderKL) -> str:
    """Of all values as they are loaded, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
