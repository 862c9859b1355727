"""Write a trained tokenizer, load it back, and compare indices and reconstructions.

A tokenizer is exported as one of diffusers' own classes if that class finds the same codes. So a
tokenizer with VQ, LFQ or BSQ becomes a `VQModel`. A tokenizer with FSQ, residual VQ or
Gumbel-softmax stays a `DiscreteAutoencoder`, and so does a tokenizer whose decoder predicts a
likelihood. A vision transformer stays a `ViTTokenizer`, and a VQ-VAE-2 stays a `VQVAE2`.

A `VQModel` of diffusers computes the distances to codes in another way than the trained tokenizer.
So a `VQModel` may choose another code if two codes have the same distance up to rounding (a tie).
The export counts the ties. A tokenizer with many ties is exported in its own class, not as a
`VQModel`. Untrained codes cause many ties, because they are short compared with the features.

`z` feature, `c` code, `K` codes, `L` codes per latent position.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentvae.compute.stock_layers import restore_stock_layers
from latentvae.errors import UserError
from latentvae.export.card import ModelCard, write_card
from latentvae.export.export_folder import check_folder, load_back, probes, written_whole
from latentvae.export.half_precision import HalfPrecision, check_half_precision
from latentvae.latents import LatentStatistics
from latentvae.models import DiscreteFamily, Network, calls, family_of

MIN_EQUAL = 0.999  # share of indices that must be equal
# Two codes tie if their squared distances differ by at most this share of |z|^2 + |c|^2.
TIE = 1e-5


@dataclass(frozen=True)
class TokenizerReport:
    """The results of a tokenizer's export, and of its comparison with the trained tokenizer.

    Args:
        path: the folder of the export.
        network: the class that loads the export: `"VQModel"` or the tokenizer's own class.
        reason: why the export is not a VQModel. Empty if the export is a VQModel.
        quantizer: type of the quantiser, see `bottlenecks.QUANTIZERS`.
        num_codes, num_levels: number of codes K of each codebook, and number L of codes (tokens) at
            each latent position.
        scaling_factor: 1 / std of the exported tokenizer's features. With a frozen encoder, the
            value of the pretrained network.
        num_images: number of images that `scaling_factor` was measured on.
        half_precision: result of the float16 check.
        equal_share: share of indices that equal the indices of the trained network, over all
            compared image sizes.
        ties: number of indices that differ only because of rounding. 0 with `unit_range`, because
            ties are then not counted.
        unit_range: whether pixels are in [0, 1] and codes are looked up by index, as the aMUSEd
            pipeline needs.
        compared_sizes: image sizes (H, W) at which the export was compared with the trained
            tokenizer.
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
        """Return the results as a few lines of text for the terminal."""
        return "\n".join([f"export {self.path} ({self.network})", *self._lines("  ")])

    def facts(self) -> str:
        """Return the lines of `summary` as a section of the model card."""
        return "\n".join(["## Export", "", *self._lines("- ")])

    def _lines(self, mark: str) -> list[str]:
        # facts of every tokenizer
        half, sizes = self.half_precision, ", ".join(f"{h} x {w}" for h, w in self.compared_sizes)
        lines = [
            f"{self.quantizer}: {self.size}",
            f"scaling_factor {self.scaling_factor:.5f} (1 / std of the features before "
            f"quantisation, on {self.num_images} images. With a frozen encoder, the value is that "
            "of the pretrained model)",
            f"float16 {'safe' if half.safe else 'not safe'} ({half})",
            f"loaded back and compared at {sizes}: {self.equal_share:.4%} of the indices are "
            "the same, "
            + (
                "and images decoded from the same indices are equal except for rounding"
                if self.unit_range
                else f"{self.ties} features have two codes at the same distance, and images "
                "decoded from the same indices are equal, bit for bit"
            ),
        ]

        # facts of some tokenizers
        if self.reason:
            lines.append(f"not a diffusers VQModel: {self.reason}")
        if self.unit_range:
            lines.append(
                "pixels in [0, 1] and codes looked up by index, as aMUSEd needs. The zero padding "
                "of encode() is black, but in training it was grey. So tokens near the picture's "
                "edge may differ"
            )
        return [mark + line for line in lines]


def export_tokenizer(
    net: Network,
    out: Path,
    *,
    statistics: LatentStatistics,
    resolution: int,
    probe: Tensor,
    card: ModelCard | None = None,
    frozen_encoder: bool = False,
    lookup_from_codebook: bool = False,
    overwrite: bool = False,
) -> TokenizerReport:
    """Export the tokenizer `net` to the folder `out`, and compare the export with `net`.

    The folder appears only if the exported network gives the same tokens (except for ties) and the
    same images as `net`. With `lookup_from_codebook`, different tokens and rounding errors in the
    images are allowed.

    Args:
        net: the trained network. Use the averaged weights if the training averaged them. This
            function does not change the network.
        statistics: statistics of the network's features.
        resolution: side of the training images in pixels.
        probe: real images (B, C, H, W) in [-1, 1], on which the export is compared with `net`.
        frozen_encoder: keep the features and the `scaling_factor` of the pretrained network,
            because its encoder was not trained.
        lookup_from_codebook: export for the aMUSEd pipeline, which looks codes up by index and has
            pixels in [0, 1]. Tokens that differ are then counted, but are not an error.
        overwrite: replace an earlier export.

    Raises:
        UserError: an option does not fit the network, or `out` exists and may not be replaced.
        RuntimeError: the network that is loaded back differs from the trained network.
    """
    # measure
    check_folder(out, overwrite=overwrite)
    family = discrete_family(net)
    reason = family.why_not_stock(net.config)
    if reason and lookup_from_codebook:
        raise UserError(
            f"lookup_from_codebook is an option of VQModel, but this network cannot be a VQModel: "
            f"{reason}. Leave the option out."
        )
    trained: Any = copy.deepcopy(net).cpu().float().eval()
    restore_stock_layers(trained)  # the loaded export has diffusers' own layers too
    probe = probe.to("cpu", torch.float32)
    half = check_half_precision(trained, probe)

    # choose the class
    written, factor = trained, 1.0
    if not reason:
        written = family.to_stock(trained, unit_range=lookup_from_codebook)
        factor = 1.0 if frozen_encoder else family.fit_stock(trained, written, probe)
        reason = "" if lookup_from_codebook else _why_too_near(trained, written, probe, factor)
    if reason:
        written, factor = copy.deepcopy(trained), 1.0

    # config
    scaling = statistics.scaling_factor / factor
    if frozen_encoder:
        scaling = net.config["scaling_factor"]
    written.register_to_config(sample_size=int(resolution), scaling_factor=scaling)
    if not reason:
        written.register_to_config(force_upcast=not half.safe)

    # write, load back, compare
    codes = family.codes(net)
    with written_whole(out) as folder:
        written.save_pretrained(folder)
        loaded = load_back(folder, type(written))
        equal, ties = _compare_indices(
            trained, loaded, probe, factor=None if lookup_from_codebook else factor
        )
        _compare_images(trained, loaded, probe, exact=not lookup_from_codebook)

        report = TokenizerReport(
            path=out,
            network=type(written).__name__,
            reason=reason,
            quantizer=codes.kind,
            num_codes=codes.number,
            num_levels=codes.levels,
            scaling_factor=scaling,
            num_images=statistics.num_images,
            half_precision=half,
            equal_share=equal,
            ties=ties,
            unit_range=lookup_from_codebook,
            compared_sizes=tuple((p.shape[2], p.shape[3]) for p in probes(trained, probe)),
        )
        card = card or ModelCard(name=out.name)
        write_card(card, folder, net=written, config=dict(written.config), report=report)
    return report


def discrete_family(net: Network) -> DiscreteFamily:
    """Return the `DiscreteFamily` object that describes the architecture of the tokenizer `net`."""
    family = family_of(net)
    assert isinstance(family, DiscreteFamily), type(net)
    return family


def _why_too_near(trained: Network, stock: Network, probe: Tensor, factor: float) -> str:
    """Return a reason if `stock` and `trained` choose different codes too often, else ""."""
    equal, _ = _compare_indices(trained, stock, probe, factor=factor)
    if equal >= MIN_EQUAL:
        return ""
    return (
        f"only {equal:.2%} of the indices would be equal, because the codes are nearer to one "
        "another than VQModel's search can resolve"
    )


@torch.no_grad()
def _compare_indices(
    trained: Network, net: Network, probe: Tensor, *, factor: float | None
) -> tuple[float, int]:
    """Return the share of indices that are equal in both networks, and the number of ties.

    Args:
        factor: scale of the features of `net` relative to those of `trained`. With None, the
            function does not check whether indices that differ are ties, and returns 0 ties.

    Raises:
        RuntimeError: the two networks choose different codes for a feature, and its distances to
            these two codes differ by more than rounding.
    """
    equal = total = 0
    for images in probes(trained, probe):
        features = calls.encode(trained, images)
        ours = calls.tokenize(trained, features)
        theirs = calls.tokenize(net, calls.encode(net, images))
        equal += int((ours == theirs).sum())
        total += ours.numel()
        if factor is not None and not torch.equal(ours, theirs):
            _check_ties(trained, net, features * factor, ours, theirs)
    return equal / total, 0 if factor is None else total - equal


def _check_ties(
    trained: Network, net: Network, features: Tensor, ours: Tensor, theirs: Tensor
) -> None:
    """Check that, where indices differ, both codes are almost equally far from the feature."""
    if family_of(net) is family_of(trained):  # the same arithmetic, so nothing may differ
        raise RuntimeError(
            f"{int((ours != theirs).sum())} of the export's indices differ from those of the "
            "trained tokenizer."
        )
    where = (ours != theirs).cpu()
    codes = discrete_family(trained).quantizers(trained)[0].codes
    z, near, far = (
        vectors.cpu().double().movedim(1, 3)[where]
        for vectors in (features, codes(ours), codes(theirs))
    )
    gap = ((far - z).square().sum(1) - (near - z).square().sum(1)).abs()
    worst = (gap / (z.square().sum(1) + near.square().sum(1))).max().item()
    if worst > TIE:
        raise RuntimeError(
            f"the export takes another code than the trained tokenizer: the squared distances of "
            f"both codes differ by {worst:g} of |feature|^2 + |code|^2."
        )


@torch.no_grad()
def _compare_images(trained: Network, loaded: Network, probe: Tensor, *, exact: bool) -> None:
    """Check that both networks decode the same indices to equal images.

    Rounding errors are allowed if `exact` is false.
    """
    for images in probes(trained, probe):
        indices = calls.tokenize(trained, calls.encode(trained, images))
        ours = calls.decode_indices(trained, indices)
        theirs = family_of(loaded).decode_without_search(loaded, indices)
        if not (torch.equal(ours, theirs) if exact else torch.allclose(ours, theirs, atol=1e-4)):
            difference = (ours - theirs).abs().max().item()
            raise RuntimeError(
                "the images that the export and the trained tokenizer decode from the same indices "
                f"differ by {difference:g}."
            )
