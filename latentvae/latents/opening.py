"""Load the autoencoder for `encode` or `decode` on the device of this process."""

from pathlib import Path

from latentvae.autoencoder import Autoencoder, load
from latentvae.compute.optimization import Optimize
from latentvae.distributed import launched_device, launched_rank


def open_model(
    path: str | Path,
    *,
    device: str | None,
    optimize: Optimize | None = None,
    variant: str | None = None,
) -> Autoencoder:
    """Load an autoencoder. With `optimize`, the first rank prints which optimisation is used."""
    device = device or launched_device()
    model = load(path, device=device, optimize=optimize, variant=variant)
    if optimize is not None and launched_rank()[0] == 0:
        print(f"{model.name}: {model.optimization}")
    return model
