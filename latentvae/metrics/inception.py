"""Load the Inception-v3 network of FID (Frechet Inception distance), with its original weights.

FID is defined by one network, the TensorFlow graph of 2015-12-05 (Heusel et al. 2017,
https://arxiv.org/abs/1706.08500), including its resize to 299 pixels. torch-fidelity ported this
network to torch (https://github.com/toshas/torch-fidelity). Other weights give values that look
like FID but cannot be compared with FID.

`B` batch, `H W` height and width.
"""

import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from latentvae.errors import UserError, nearest

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class InceptionFeatures(nn.Module):
    """FID's Inception-v3 without its classifier. The network returns 2,048 features per image.

    The network is always in eval mode, and its features have no gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train()

    def train(self, mode: bool = True) -> "InceptionFeatures":
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features (B, 2048), float32, of images (B, 3, H, W) in [-1, 1].

        The images are rounded to 8 bits first.
        """
        pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        with torch.autocast(device_type=images.device.type, enabled=False):
            (features,) = self.network(pixels)
        return features


def load_inception(
    weights: str | Path | None = None, *, allow_download: bool = False
) -> InceptionFeatures:
    """Return FID's Inception network on the CPU, with its original weights.

    Args:
        weights: path of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth` (91 MB).
            Default: the file in the torch hub cache.
        allow_download: download the file if it is not in the cache.

    Raises:
        UserError: torch-fidelity is not installed, there is no file, or the file holds other
            weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("rfid needs torch-fidelity. Run `pip install latentvae[fid]`.") from error
    path = _named_file(Path(weights)) if weights is not None else _cached_file(allow_download)
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=_read(path)
    )
    return InceptionFeatures(network)


def _read(path: Path) -> io.BytesIO:
    """Return the network's weights from the file `path`, as a new file in memory.

    torch-fidelity reads its file with `weights_only=False`, which can run code from a file. So this
    function checks the file, reads it safely, and returns a new copy for torch-fidelity.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise UserError(
                f"'{path}' is not FID's Inception: its sha256 begins with {digest[:8]}, but that "
                f"of {URL} begins with {SHA256[:8]}."
            )
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    return copy


def _named_file(path: Path) -> Path:
    if path.is_file():
        return path
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings)
    raise UserError(
        f"The Inception weights of rfid must be the file from {URL}, but '{path}' does not exist"
        f"{hint}"
    )


def _cached_file(allow_download: bool) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if not path.is_file() and not allow_download:
        raise UserError(
            "rfid needs the Inception weights. Give the path of their file, or allow the download "
            f"from {URL}"
        )
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Could not download {URL} ({error}). Fetch the file yourself and give its path."
            ) from error
    return path
