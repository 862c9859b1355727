"""Write a trained tokenizer as a stock diffusers `VQModel` where that finds the same codes, else as
this package's `DiscreteAutoencoder`; load it back, and compare indices and reconstructions.

A `VQModel` searches with its own arithmetic, so two codes at the same distance to rounding may
change places: that is a tie, and is counted.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.export.card import ModelCard, write_card
from latentvae.export.diffusers import check_folder, probes, written_whole
from latentvae.export.half_precision import HalfPrecision, check_half_precision
from latentvae.latents import LatentStatistics
from latentvae.models import DiscreteAutoencoder, calls
from latentvae.models.discrete import scale_features, to_vq_model

MIN_EQUAL = 0.999  # share of indices that must be equal
TIE = 1e-5  # relative difference of two distances that are the same to rounding


@dataclass(frozen=True)
class TokenizerReport:
    """One written, loaded back and compared tokenizer.

    Args:
        path: the folder.
        network: the class that loads it, `"VQModel"` or `"DiscreteAutoencoder"`.
        reason: why it is not a VQModel; empty if it is.
        quantizer: its type, see `bottlenecks.QUANTIZERS`.
        num_codes, num_levels: K and L.
        scaling_factor: 1 / std of its features.
        num_images: images that was measured on.
        half_precision: the float16 check.
        equal_share: indices equal to the trained network's, over all compared sizes.
        ties: indices that differ and are as near to rounding.
        unit_range: pixels in [0, 1] and codes looked up by index, as aMUSEd asks.
        compared_sizes: (H, W).
    """

    path: Path
    network: str
    reason: str
    quantizer: str
    num_codes: int
    num_levels: int
    scaling_factor: float
    num_images: int
    half_precision: HalfPrecision
    equal_share: float
    ties: int
    unit_range: bool
    compared_sizes: tuple[tuple[int, int], ...]

    @property
    def force_upcast(self) -> bool:
        return not self.half_precision.safe

    @property
    def kind(self) -> str:
        return f"A discrete tokenizer of images ({self.quantizer})"

    @property
    def size(self) -> str:
        levels = f", {self.num_levels} for each position" if self.num_levels > 1 else ""
        return f"K = {self.num_codes:,} codes{levels}"

    def summary(self) -> str:
        """A few lines for the screen."""
        return "\n".join([f"export {self.path} ({self.network})", *self._lines("  ")])

    def facts(self) -> str:
        """The same for the model card."""
        return "\n".join(["## Export", "", *self._lines("- ")])

    def _lines(self, mark: str) -> list[str]:
        half, sizes = self.half_precision, ", ".join(f"{h} x {w}" for h, w in self.compared_sizes)
        lines = [
            f"{self.quantizer}: {self.size}",
            f"1 / std of the features before they are quantised: {self.scaling_factor:.5f} on "
            f"{self.num_images} images",
            f"float16 {'safe' if half.safe else 'not safe'} ({half})",
            f"loaded back and compared at {sizes}: {self.equal_share:.4%} of the indices equal, "
            f"{self.ties} ties; images of equal indices equal"
            f"{' to rounding' if self.unit_range else ', bit for bit'}",
        ]
        if self.reason:
            lines.append(f"not a diffusers VQModel: {self.reason}")
        if self.unit_range:
            lines.append(
                "pixels in [0, 1] and codes looked up by index, as aMUSEd asks; "
                "encode() sees black beyond the picture's edge where training saw "
                "grey: tokens may differ, most at the edge"
            )
        return [mark + line for line in lines]


def export_tokenizer(
    net: DiscreteAutoencoder,
    out: Path,
    *,
    statistics: LatentStatistics,
    resolution: int,
    probe: Tensor,
    card: ModelCard | None = None,
    lookup_from_codebook: bool = False,
    overwrite: bool = False,
) -> TokenizerReport:
    """Export `net` to the folder `out`; nothing appears there unless it gives the trained network's
    tokens and images.

    Args:
        net: the trained network (the averaged weights, where there are such); it is not changed.
        statistics: of its features.
        resolution: side of the training images in pixels.
        probe: real images (B, C, H, W) in [-1, 1] to compare on.
        lookup_from_codebook: for aMUSEd: codes by index, pixels in [0, 1].
        overwrite: replace an earlier export.

    Raises:
        UserError: an option that cannot be, or a folder that is in the way.
        RuntimeError: what is loaded back is not what was trained.
    """
    check_folder(out, overwrite=overwrite)
    trained: Any = copy.deepcopy(net).cpu().float().eval()
    probe = probe.to("cpu", torch.float32)
    half = check_half_precision(trained, probe)
    written, reason, factor = _network(trained, probe, unit_range=lookup_from_codebook)
    if reason and lookup_from_codebook:
        raise UserError(f"lookup_from_codebook is an option of VQModel, and this is none: {reason}")
    written.register_to_config(sample_size=int(resolution))
    scaling = statistics.scaling_factor / factor
    if not reason:
        written.register_to_config(scaling_factor=scaling, force_upcast=not half.safe)
    with written_whole(out) as folder:
        written.save_pretrained(folder)
        loaded = _load_back(folder, type(written))
        equal, ties = _compare(trained, loaded, probe, exact=not lookup_from_codebook)
        report = TokenizerReport(
            path=out,
            network=type(written).__name__,
            reason=reason,
            quantizer=net.config["quantizer"]["type"],
            num_codes=net.quantize.num_codes,
            num_levels=net.quantize.num_levels,
            scaling_factor=scaling,
            num_images=statistics.num_images,
            half_precision=half,
            equal_share=equal,
            ties=ties,
            unit_range=lookup_from_codebook,
            compared_sizes=tuple((p.shape[2], p.shape[3]) for p in probes(trained, probe)),
        )
        config = dict(written.config)
        write_card(card or ModelCard(name=out.name), folder, config=config, report=report)
    return report


def _network(trained: Any, probe: Tensor, *, unit_range: bool) -> tuple[Any, str, float]:
    """What is written, why it is no VQModel, and the factor on its features."""
    stock = to_vq_model(trained, unit_range=unit_range)
    if stock is None:
        kind = trained.config["quantizer"]["type"]
        why = f"the quantiser {kind} is no search of the nearest code in a list"
        if trained.likelihood is not None:
            why = f"its decoder gives the parameters of a {trained.config['likelihood']} likelihood"
        return copy.deepcopy(trained), why, 1.0
    return stock, "", scale_features(trained, stock, probe)


def _load_back(folder: Path, cls: type[Any]) -> Any:
    net, info = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise RuntimeError(f"the export is not loaded whole: {problems}")
    return copy.deepcopy(net).eval()


@torch.no_grad()
def _compare(trained: Any, loaded: Any, probe: Tensor, *, exact: bool) -> tuple[float, int]:
    """Share of equal indices, and ties.

    Args:
        exact: images of equal indices must be equal, not only to rounding, and so must the share.
    """
    equal = total = ties = 0
    for images in probes(trained, probe):
        ours = calls.tokenize(trained, calls.encode(trained, images))
        theirs = calls.tokenize(loaded, calls.encode(loaded, images))
        equal += int((ours == theirs).sum())
        total += ours.numel()
        if exact:
            ties += _count_ties(trained, images, ours, theirs)
        a, b = calls.decode_indices(trained, ours), _of_indices(loaded, ours)
        if not (torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-4)):
            difference = (a - b).abs().max().item()
            raise RuntimeError(f"the export's images of equal indices differ by {difference:g}")
    if exact and equal / total < MIN_EQUAL:
        raise RuntimeError(f"only {equal / total:.4%} of the export's indices are equal")
    return equal / total, ties


def _count_ties(trained: Any, images: Tensor, ours: Tensor, theirs: Tensor) -> int:
    """How many indices differ; each must be a tie."""
    where = ours != theirs
    if not where.any():
        return 0
    features = trained.encode(images).latents.double()
    if getattr(trained.quantize, "l2_normalize", False):
        features = torch.nn.functional.normalize(features, dim=1)
    near, far = (
        (features - trained.quantize.codes(i).double()).square().sum(1)[where]
        for i in (ours, theirs)
    )
    worst = ((far - near).abs() / near.clamp(min=1e-12)).max().item()
    if worst > TIE:
        raise RuntimeError(f"the export takes another code, {worst:g} further away")
    return int(where.sum())


def _of_indices(net: Any, indices: Tensor) -> Tensor:
    """Images of indices, without searching again."""
    if isinstance(net, DiscreteAutoencoder):
        return calls.decode_indices(net, indices)
    codes = calls.codes_of(net, indices)
    if net.config["lookup_from_codebook"]:  # indices and a shape are what it takes
        shape = (len(indices), *indices.shape[1:], codes.shape[1])
        sample = net.decode(indices.flatten(), force_not_quantize=True, shape=shape).sample
        return sample * 2 - 1
    return net.decode(codes, force_not_quantize=True).sample
