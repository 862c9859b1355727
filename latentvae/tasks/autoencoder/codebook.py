"""Initialise and update codes of a discrete bottleneck, and compute Gumbel-softmax's temperature.

The codes are initialised by k-means and updated from the vectors of all ranks.

`N` vectors, `c` feature channels, `K` codes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from latentvae.bottlenecks import Quantizer
from latentvae.data import EvalTransform, ImageSource, UnreadableImage
from latentvae.distributed import all_reduce_sum, gather_cat
from latentvae.engine.randomness import Stream, generator_for
from latentvae.errors import UserError
from latentvae.models import DiscreteFamily, Network, family_of
from latentvae.outputs import AutoencoderOutput, Latent
from latentvae.tasks.autoencoder.config import TrainConfig

START_BATCH = 16  # images encoded at a time
START_VECTORS = 32  # largest number of vectors for each code in k-means


class CodebookUpdate:
    """Gathers statistics over all batches and ranks of an update, then updates the codes.

    The statistics are sums over encoder vectors, see `bottlenecks.Quantized.statistics`.

    Args:
        quantizers: the quantiser of each latent, not wrapped by DDP. Empty if the network has no
            codes.
        seed: seed of the random choice of encoder vectors that replace unused codes.
    """

    def __init__(self, quantizers: Sequence[Quantizer], *, seed: int) -> None:
        self._books = [_Book(quantizer) for quantizer in quantizers]
        self.seed = seed

    def add(self, out: AutoencoderOutput) -> None:
        """Add the statistics of one batch."""
        for book, latent in zip(self._books, out.latents, strict=False):
            book.add(latent)

    @torch.no_grad()
    def apply(
        self,
        update: int,
        *,
        optimizer: torch.optim.Optimizer,
        averages: Mapping[nn.Parameter, Tensor],
    ) -> dict[str, Tensor]:
        """Update the codes after the optimizer's step. All ranks make the same update.

        Args:
            update: number of the update, from 0.
            optimizer: the optimizer of the codes. For restarted codes, which are unused codes that
                got new values, the optimizer's moments are set to 0.
            averages: moving average (EMA) of each parameter. For restarted codes, the average is
                set to the new code.

        Returns:
            Values to log.
        """
        restarted = [
            book.apply(
                optimizer=optimizer,
                averages=averages,
                generator=generator_for(Stream.CODEBOOK, self.seed, update, *_latent(place)),
            )
            for place, book in enumerate(self._books)
            if book.filled
        ]

        return {"tokens/restarted": torch.stack(restarted).sum().float()} if restarted else {}

    def clear(self) -> None:
        for book in self._books:
            book.clear()


class _Book:
    """The quantiser of one latent, with the statistics of an update."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.clear()

    def clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._features: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether there are statistics to learn from."""
        return bool(self._sums)

    def add(self, latent: Latent) -> None:
        for name, value in (latent.statistics or {}).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._features = latent.features

    def apply(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        averages: Mapping[nn.Parameter, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Update the codes, and return how many unused codes were replaced (restarted)."""
        # update the codes
        assert self._features is not None
        sums = {name: all_reduce_sum(value) for name, value in self._sums.items()}
        vectors = self._features.detach().float().movedim(1, -1).flatten(0, -2)  # (N, c)
        restarts = self.quantizer.restart_threshold > 0
        before = {w: w.clone() for w in self.quantizer.parameters()} if restarts else {}
        restarted = self.quantizer.update(
            sums, features=gather_cat(vectors) if restarts else vectors, generator=generator
        )

        # set the weight averages and the optimizer's moments of restarted codes
        for weight, old in before.items():
            changed = (weight != old).any(1, keepdim=True)  # (K, 1), no wait for the GPU
            if weight in averages:
                averages[weight].copy_(torch.where(changed, weight, averages[weight]))
            for moment in optimizer.state.get(weight, {}).values():
                if moment.shape == weight.shape:
                    moment.masked_fill_(changed, 0.0)
        return restarted


def _latent(place: int) -> tuple[int, ...]:
    """Return counters for `generator_for` that give each latent its own random numbers.

    The result is empty for the first latent.
    """
    return (2, place) if place else ()


@contextlib.contextmanager
def computed_alone(net: Network) -> Iterator[None]:
    """Put the quantisers in eval mode in this context, for code that only one rank runs.

    In train mode, an entropy loss is averaged over all ranks. A single rank would wait forever for
    the other ranks.
    """
    quantizers = family_of(net).quantizers(net)
    modes = [quantizer.training for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.eval()
        yield
    finally:
        for quantizer, mode in zip(quantizers, modes, strict=True):
            quantizer.train(mode)


@torch.no_grad()
def initialise_codebook(
    net: Network,
    source: ImageSource,
    transform: EvalTransform,
    *,
    images_per_update: int,
    seed: int,
) -> None:
    """Initialise the codes by k-means on the encoder's features of random images, before training.

    A VQ-VAE-2 has several latents, and the features of a latent depend on the codes of earlier
    latents. So the codes are initialised for one latent after the other.

    Args:
        net: the network, whose codes are changed.
        source: images to encode.
        transform: transform that turns images into tensors.
        images_per_update: number of images whose feature vectors form one batch of k-means.
        seed: seed of the choice of images and of k-means.

    Raises:
        UserError: no image can be read.
    """
    family = family_of(net)
    assert isinstance(family, DiscreteFamily), type(net)
    for place, quantizer in enumerate(family.quantizers(net)):
        # gather vectors
        wanted = START_VECTORS * quantizer.num_codes
        print(
            f"encoding images for {wanted:,} vectors, from which k-means makes the codes",
            flush=True,
        )
        vectors: list[Tensor] = []
        vectors_per_image = 0
        for images in _batches(source, transform, seed=seed):
            with computed_alone(net):
                features = family.features(net, images.to(net.device))[place]
            vectors_per_image = features[0, 0].numel()
            vectors.append(features.movedim(1, -1).flatten(0, -2))
            if sum(map(len, vectors)) >= wanted:
                break
        if not vectors:
            raise UserError(f"none of the {len(source):,} images for k-means can be read")

        found = torch.cat(vectors)[:wanted]
        if len(found) < quantizer.num_codes:
            print(
                f"k-means has {len(found):,} vectors for {quantizer.num_codes:,} codes. Some codes "
                "start equal and stay unused until they restart (restart_threshold)."
            )

        # k-means
        print(f"k-means of {len(found):,} vectors for {quantizer.num_codes:,} codes", flush=True)
        quantizer.initialise(
            found,
            generator=generator_for(Stream.CODEBOOK, seed, 0, *_latent(place)),
            batch_vectors=images_per_update * vectors_per_image,
        )


def _batches(source: ImageSource, transform: EvalTransform, *, seed: int) -> Iterator[Tensor]:
    order = torch.randperm(len(source), generator=generator_for(Stream.CODEBOOK, seed, 0, 1))
    images: list[Tensor] = []
    for i in map(int, order):
        try:
            images.append(transform(source.read(i)))
        except UnreadableImage:
            continue  # the training reports this image
        if len(images) == START_BATCH:
            yield torch.stack(images)
            images = []
    if images:
        yield torch.stack(images)


def wants_start(config: TrainConfig) -> bool:
    """Return whether k-means initialises the codes of a new run."""
    return config.model.bottleneck.starts_by_kmeans


def temperature(config: TrainConfig, update: int) -> float:
    """Return the temperature of Gumbel-softmax in an update (counted from 0).

    The result is 1 for networks without Gumbel-softmax.
    """
    return config.model.bottleneck.temperature_at(update)
