"""Use any image autoencoder of diffusers on images of any size, from PIL, NumPy or torch.

    model = latentvae.load("runs/demo/export")
    z = model.encode(Image.open("photo.jpg"))  # (1, d, ceil(H / f), ceil(W / f))
    picture = model.decode(z, size=(H, W), output_type="pil")[0]

Symbols: `B` batch size, `C` channels, `H W` pixels, `f` downsampling factor, `d` latent channels,
`h w` latent positions, `K` codes.
"""

import hashlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from latentvae.compute.optimization import Optimize, Optimized, check_mode, optimize_network
from latentvae.compute.precision import full_float32
from latentvae.compute.strips import (
    StripComputation,
    Strips,
    check_supported,
    price_in_strips,
)
from latentvae.errors import UserError
from latentvae.models import Network, SingleFileKind, calls, family_of, load_network
from latentvae.pictures import Images, Kind, OutputType, convert, read_pictures

AnyImages = TypeVar("AnyImages", bound=Images)

# A model in a folder with one of these names gets the name of the parent folder.
_GENERIC_NAMES = ("export", "vae", "vqvae", "movq")

# A call that computes in strips can take long. Its time is estimated if an image has at least
# PIXELS_WORTH_PRICING pixels. The estimate is printed if it is longer than PRICE_WORTH_TELLING
# seconds.
PIXELS_WORTH_PRICING, PRICE_WORTH_TELLING = 512**2, 10.0


class NotFiniteError(UserError, RuntimeError):
    """Raised if a network computes infinite values or NaN."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        advice = ": use bfloat16 or float32" if dtype == torch.float16 else ""
        super().__init__(f"'{name}' overflows in {str(dtype).removeprefix('torch.')}{advice}")


class Autoencoder:
    """An autoencoder in eval mode with frozen weights, whose methods take pictures.

    Images are padded at the right and at the bottom to a multiple of the downsampling factor f (of
    2 f for FLUX.2). Reconstructions are cropped back to the image size. The padding reflects the
    image. If the image is too small to be reflected, its border is replicated. A tokenizer (a
    network with discrete codes) raises an error for images with a side below f pixels, because the
    tokens of such an image would describe the padding. Returned tensors are not inference-mode
    tensors, so a diffusion model can be trained on them.

    Args:
        net: a diffusers autoencoder of images, on the device and in the dtype of the computation.
            The network is not copied. The network is put in eval mode, and its parameters no longer
            require gradients. Pass a `copy.deepcopy` if you want to train the network further.
        name: name of the model in reports.
        path: the folder, file or Hub id that the network was loaded from.
        optimize: method that makes the computation faster, see `compute.optimization`. With None,
            `net` itself computes the results.
        strips: compute large images strip by strip (in bands of rows). Strips give the same results
            as the whole image up to rounding, and need little memory. Before a call that takes more
            than ten seconds, the estimated time is printed on stderr, once per image size. Only
            networks with diffusers' convolutional `Encoder` and `Decoder` can compute in strips,
            such as `AutoencoderKL` and `VQModel`.

    Attributes:
        optimization: an `Optimized` object, whose network computes the results.
            `str(optimization)` names the mode and, for `"fast"` and `"openvino"`, its PSNR against
            `"exact"`. The weights of `net` do not change.
        f: downsampling factor.
        image_channels: number of image channels C: 1 (grey), 3 (RGB) or 4 (RGBA).
        fixed_size: side of the images in pixels if the network supports only one size
            (AutoencoderRAE), else None.
        num_codes: number of codes K of a tokenizer. None for other networks.
        smallest_side: smallest side of an image in pixels: f for a tokenizer, else 1.
        normalization: shift and scale that `encode(..., scaled=True)` applies to latents.

    Raises:
        UserError: `net` is no autoencoder of images, `strips` is set for a network that does not
            support strips, or `strips` and `optimize` are both set.
    """

    def __init__(
        self,
        net: Network,
        *,
        name: str,
        path: str | None = None,
        optimize: Optimize | None = None,
        strips: bool | Strips = False,
    ) -> None:
        self.net: Network = net.eval().requires_grad_(False)
        self.name, self.path = name, path
        self.strips = (Strips() if strips else None) if isinstance(strips, bool) else strips
        self._priced: set[tuple[str, int, int, int]] = set()
        if self.strips is not None:
            _check_strips(net, name, optimize)
        self.optimization = Optimized(self.net, "stock")
        if optimize is not None:
            self.optimization = optimize_network(self.net, mode=optimize)
        shape = calls.measure_shape(self.net)
        self.f, self.latent_channels, self.fixed_size = shape.f, shape.channels, shape.fixed_size
        self.image_channels: int = calls.image_channels(net)
        self.num_codes = calls.num_codes(net)
        self.smallest_side = 1 if self.num_codes is None else self.f
        self.normalization = family_of(net).normalization(net)

    @property
    def _computation(self) -> calls.Computation | None:
        return None if self.strips is None else StripComputation(self.strips)

    @property
    def scaling_factor(self) -> float:
        return self.normalization.scaling_factor

    @property
    def shift_factor(self) -> float:
        return self.normalization.shift_factor

    def encode(
        self,
        images: Images,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        scaled: bool = False,
    ) -> Tensor:
        """Return latents (B, d, ceil(H / f), ceil(W / f)) on the network's device, in its dtype.

        d is the number of latent channels, and f is the downsampling factor. For FLUX.2, height and
        width of the latents are rounded up to even numbers. The latents of a tokenizer are not
        quantised. The methods `decode` and `encode_tokens` quantise latents.

        Args:
            images: PIL image(s) of one size, or a NumPy array, or a torch tensor. Arrays are (B, H,
                W, C) or (H, W, C), as uint8, uint16 or float in [0, 1]. Tensors are (B, C, H, W) in
                [-1, 1].
            sample: draw from the posterior, instead of taking its mode.
            generator: random generator of the samples. None means torch's global generator.
            scaled: return latents as a diffusion model sees them, shifted and scaled to about unit
                variance. For FLUX.2, 2 x 2 positions also become channels: (B, 4 d, h / 2, w / 2).
        """
        return self._encode(self._read(images)[0], sample, generator, scaled).clone()

    @full_float32()
    @torch.no_grad()
    def encode_posterior(self, images: Images) -> tuple[Tensor, Tensor | None]:
        """Return mean and log-variance of the posterior, each (B, d, h, w).

        d is the number of latent channels. For a network without a posterior, return its latent and
        None.
        """
        prepared = self._prepare(self._read(images)[0])
        self._tell_price("encode", prepared.shape)
        return calls.encode_posterior(
            self.optimization.net, prepared, computation=self._computation
        )

    @full_float32()
    def encode_tokens(self, images: Images) -> Tensor:
        """Return a tokenizer's indices in 0..K - 1: (B, h, w), or (B, L, h, w).

        K is the number of codes. L is the number of codes per position, if there are several. If a
        tokenizer has several maps of codes (VQ-VAE-2), L counts the codes of all maps per position
        of the coarsest map, see `models.levels`.

        Raises:
            UserError: the network is not a tokenizer.
            NotFiniteError: the network's features overflow, so there is no nearest code.
        """
        if self.num_codes is None:
            raise UserError(f"'{self.name}' is no tokenizer: it has no codes")
        features = self.encode(images)
        if not features.isfinite().all():
            raise NotFiniteError(self.name, self.net.dtype)
        return calls.tokenize(self.net, features)

    def decode(
        self,
        z: Tensor,
        *,
        size: tuple[int, int] | None = None,
        scaled: bool = False,
        output_type: OutputType = "pt",
    ) -> Images:
        """Decode latents to images.

        Args:
            z: the latents, (B, d, h, w), with d latent channels.
            size: (H, W) of the result, which is the top-left part of the decoded image. With None,
                nothing is cropped, and the result has the size f * h by f * w, where f is the
                downsampling factor.
            scaled: whether the latents have the form that `encode(..., scaled=True)` returns.
            output_type: `"pt"` for (B, C, H, W) float32 in [-1, 1], `"np"` for (B, H, W, C) float32
                in [0, 1], or `"pil"` for a list of PIL images.

        Raises:
            UserError: the shape of `z` is wrong, `size` is larger than the decoded images, or
                `output_type` is unknown.
            NotFiniteError: the decoded images have infinite values or NaN.
        """
        channels = self.latent_channels * (self.normalization.fold**2 if scaled else 1)
        if z.ndim != 4 or z.shape[1] != channels:
            expected = f"(B, {channels}, h, w)"
            raise UserError(f"latents of '{self.name}' are {expected}, not {tuple(z.shape)}")

        return convert(self._decode(z, size, scaled).clone(), output_type)

    def decode_tokens(
        self,
        indices: Tensor,
        *,
        size: tuple[int, int] | None = None,
        output_type: OutputType = "pt",
    ) -> Images:
        """Decode a tokenizer's indices to images.

        Args:
            indices: indices in the form that `encode_tokens` returns.
            size: as in `decode`.
            output_type: as in `decode`.

        Raises:
            UserError: the network is not a tokenizer, the indices have a wrong shape, type or
                value, or `size` or `output_type` is wrong.
            NotFiniteError: as in `decode`.
        """
        if self.num_codes is None:
            raise UserError(f"'{self.name}' is no tokenizer: it has no codes")
        self._check_indices(indices)
        images = self._decode_tokens(indices.to(self.net.device, torch.int64), size)
        return convert(images.clone(), output_type)

    def reconstruct(self, images: AnyImages) -> AnyImages:
        """Encode and decode pictures.

        The result has the type (PIL, NumPy or torch), dtype and size of the input. PIL images are
        returned with 8 bits per channel. Encoding takes the mode of the posterior. A list may hold
        PIL images of different sizes. Returned tensors are clamped to [-1, 1].
        """
        if isinstance(images, Sequence) and len({getattr(i, "size", None) for i in images}) > 1:
            return cast(AnyImages, [self.reconstruct(image) for image in images])
        batch, kind = self._read(images)
        z = self._encode(batch, False, None, False)
        recon = self._decode(z, (batch.shape[2], batch.shape[3]), False).clone()
        if isinstance(images, Tensor):
            recon = recon.to(images.device)
        return cast(AnyImages, kind.restore(recon))

    def info(self) -> dict[str, Any]:
        """Return facts about the model for reports, such as its class and a hash of its weights."""
        codes = {} if self.num_codes is None else {"num_codes": self.num_codes}
        if (levels := calls.num_levels(self.net)) > 1:
            codes["num_levels"] = levels
        return {
            "class": type(self.net).__name__,
            "f": self.f,
            "latent_channels": self.latent_channels,
            **codes,
            "num_parameters": sum(value.numel() for value in self.net.parameters()),
            "dtype": str(self.net.dtype).removeprefix("torch."),
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "sample_size": self.net.config.get("sample_size"),
            "weights_sha256": hash_of_weights(self.net),
        }

    def _read(self, images: Images) -> tuple[Tensor, Kind]:
        batch, kind = read_pictures(images, channels=self.image_channels)
        if isinstance(images, Tensor) and not torch.compiler.is_compiling():
            _warn_if_unit_range(batch)
        return batch, kind

    def _prepare(self, images: Tensor) -> Tensor:
        """Check images, pad them (see `Autoencoder`), and move them to the network's device."""
        if images.shape[1] != (channels := self.image_channels):
            raise UserError(f"'{self.name}' takes {channels}-channel images, not {images.shape[1]}")
        if self.fixed_size is not None and set(images.shape[2:]) != {self.fixed_size}:
            only, given = self.fixed_size, f"{images.shape[2]} x {images.shape[3]}"
            raise UserError(f"'{self.name}' takes {only} x {only} images only, not {given}")
        if min(images.shape[2:]) < self.smallest_side:
            given = f"{images.shape[2]} x {images.shape[3]} pixels"
            raise UserError(
                f"images of {given} are too small for '{self.name}': each side needs at least "
                f"{self.f} pixels (its downsampling factor f)"
            )
        multiple = self.f * self.normalization.fold
        return pad_to_multiple(images.to(self.net.device), multiple).to(self.net.dtype)

    @full_float32()
    @torch.inference_mode()
    def _encode(
        self, images: Tensor, sample: bool, generator: torch.Generator | None, scaled: bool
    ) -> Tensor:
        images = self._prepare(images)
        self._tell_price("encode", images.shape)
        net, by = self.optimization.net, self._computation
        z = calls.encode(net, images, sample=sample, generator=generator, computation=by)
        return self.normalization.apply(z) if scaled else z

    def _check_indices(self, indices: Tensor) -> None:
        levels = calls.num_levels(self.net)
        shape = "(B, h, w)" if levels == 1 else f"(B, {levels}, h, w)"
        fits = (
            indices.ndim == 3 if levels == 1 else indices.ndim == 4 and indices.shape[1] == levels
        )
        if not fits or indices.is_floating_point() or indices.numel() == 0:
            given = f"{str(indices.dtype).removeprefix('torch.')} {tuple(indices.shape)}"
            raise UserError(f"indices of '{self.name}' are integers {shape}, not {given}")
        low, high = (int(value) for value in indices.long().aminmax())  # uint16 has no minimum
        last = (self.num_codes or 0) - 1
        if low < 0 or high > last:
            raise UserError(f"indices of '{self.name}' are in 0..{last}, not {low}..{high}")

    @full_float32()
    @torch.inference_mode()
    def _decode_tokens(self, indices: Tensor, size: tuple[int, int] | None) -> Tensor:
        self._tell_price("decode", indices.shape)
        images = calls.decode_indices(self.optimization.net, indices, computation=self._computation)
        return self._cropped(images.float(), size)

    @full_float32()
    @torch.inference_mode()
    def _decode(self, z: Tensor, size: tuple[int, int] | None, scaled: bool) -> Tensor:
        z = z.to(self.net.device, self.net.dtype)
        z = self.normalization.invert(z) if scaled else z
        self._tell_price("decode", z.shape)
        images = calls.decode(self.optimization.net, z, computation=self._computation)
        return self._cropped(images.float(), size)

    def _tell_price(self, call: Literal["encode", "decode"], shape: torch.Size) -> None:
        """Print how long a call in strips will take, if this time is long and was not printed yet.

        Args:
            call: the method that runs next, "encode" or "decode".
            shape: shape of the call's images or latents.
        """
        f = 1 if call == "encode" else self.f
        height, width = f * shape[-2], f * shape[-1]
        known = (call, shape[0], height, width)
        if self.strips is None or height * width < PIXELS_WORTH_PRICING or known in self._priced:
            return
        self._priced.add(known)
        price = price_in_strips(self.net, call, (height, width), self.strips, batch=shape[0])
        if price.seconds > PRICE_WORTH_TELLING:
            text = f"{self.name}: {call} {shape[0]} x {height} x {width} px in strips, {price}"
            tqdm.write(text, file=sys.stderr)

    def _cropped(self, images: Tensor, size: tuple[int, int] | None) -> Tensor:
        height, width = size or images.shape[2:]
        if not (0 < height <= images.shape[2] and 0 < width <= images.shape[3]):
            decoded = f"{images.shape[2]} x {images.shape[3]}"
            raise UserError(f"these latents decode to {decoded} pixels, not to {height} x {width}")
        if not images.isfinite().all():
            raise NotFiniteError(self.name, self.net.dtype)
        return images[:, :, :height, :width].clamp(-1.0, 1.0)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    family: SingleFileKind | None = None,
    variant: str | None = None,
    optimize: Optimize | None = None,
    strips: bool | Strips = False,
) -> Autoencoder:
    """Open an export of latentvae, or any autoencoder of images that diffusers knows.

    Args:
        path: a folder, a single `.safetensors` file, or a Hub id, see
            `latentvae.models.load_network`.
        device: device of the network. None means the CPU, as in diffusers.
        dtype: dtype of the weights. None means float32. In float16, a network may overflow unless
            `force_upcast` is false in its config.
        family: model family of the autoencoder in a single file: `"sd"`, `"sdxl"`, `"sd3"`,
            `"flux"` or `"other"` (latents are not scaled). Give `family` if the file does not say
            how its latents are scaled.
        variant: variant of the weights in a folder, such as `"fp16"`.
        optimize: `"exact"` computes the same numbers as without `optimize`, up to rounding.
            `"fast"` uses bfloat16 where that is faster. `"openvino"` uses OpenVINO on the CPU (`pip
            install latentvae[openvino]`). The attribute `optimization` says which mode is used, and
            its PSNR against `"exact"`. If `optimize` is set, a process on the CPU keeps the memory
            that a call frees, and uses it in later calls, see `latentvae.compute.memory`.
        strips: compute strip by strip, for images that do not fit into memory. True, or a `Strips`
            object with options. See `Autoencoder`.

    Raises:
        UserError: `path` does not exist or is no autoencoder of images, its weights are damaged, or
            another argument is wrong or does not fit the network.
    """
    # Options are checked before the weights are read.
    if optimize is not None:
        check_mode(optimize)

    net = load_network(path, dtype=dtype, family=family, variant=variant)
    name = _name(Path(path))
    try:
        return Autoencoder(
            net.to(device or "cpu"), name=name, path=str(path), optimize=optimize, strips=strips
        )
    except UserError:
        raise
    # A model's config may hold wrong numbers. Different numbers raise different exceptions.
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise UserError(f"'{path}' cannot be used: {error}") from error


def _warn_if_unit_range(images: Tensor) -> None:
    """Warn about images that seem to be in [0, 1]. The warning names the user's line of code."""
    low, high = (value.item() for value in images.aminmax())
    if not 0 <= low < high <= 1:
        return

    # Images that come from this package are in [-1, 1], even if they are bright.
    frame, level = sys._getframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        ("torch.", "contextlib", __name__)  # the methods' decorators
    ):
        frame, level = frame.f_back, level + 1
    if frame is None or frame.f_globals.get("__name__", "").startswith("latentvae."):
        return
    warnings.warn(
        f"this tensor of images has no negative value: it is in [{low:.3g}, {high:.3g}]. Tensors "
        "are read as [-1, 1], so black is -1. If your tensor is in [0, 1], give 2 * images - 1.",
        stacklevel=level,
    )


def _check_strips(net: Network, name: str, optimize: str | None) -> None:
    if optimize is not None:
        raise UserError(f"'{name}' cannot use both strips and optimize='{optimize}': give one")
    try:
        check_supported(net)
    except ValueError as error:
        raise UserError(f"'{name}' cannot be computed in strips: {error}") from error


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the right and the bottom until `multiple` divides both sides."""
    height, width = images.shape[2:]
    right, bottom = -width % multiple, -height % multiple
    if not right and not bottom:
        return images
    mode = "reflect" if right < width and bottom < height else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode)


def _name(path: Path) -> str:
    path = path.resolve() if path.exists() else path
    if path.suffix == ".safetensors":
        return path.stem
    return path.parent.name if path.name in _GENERIC_NAMES and path.parent.name else path.name


def hash_of_weights(net: Network | nn.Module) -> str:
    """Return the sha256 of the names and values of all weights, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
