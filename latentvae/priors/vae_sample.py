"""Write sampled pictures of an exported variational autoencoder (`latentvae sample`)."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from latentvae.compute.precision import full_float32
from latentvae.distributed import launched_device
from latentvae.errors import UserError
from latentvae.models.likelihood_models import load_likelihood_net, number_of_class
from latentvae.pictures import save_grid, to_pil
from latentvae.priors.sample import GRID_IMAGES, GRID_NAME, check_new_folder


@full_float32()
@torch.no_grad()
def sample_vae_folder(
    model: Path,
    out: Path,
    *,
    num: int,
    temperature: float = 1.0,
    class_name: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Path]:
    """Write sampled pictures (`00000.png`, ...) and a grid of the first 64 pictures into `out`.

    Args:
        model: folder of an exported network, or of a finished training.
        num: number of pictures.
        temperature: factor by which the prior's standard deviations are multiplied.
        class_name: name or number of the pictures' class, for a network with classes. By default, a
            random class is drawn for each picture.
        seed: seed of the random numbers. A picture does not depend on `num`.
        device: device of the computation. None takes the GPU if there is one.

    Returns:
        The paths of the pictures.

    Raises:
        UserError: an option is wrong, or the folder `out` is not empty.
    """
    if num < 1:
        raise UserError(f"num must be at least 1 (got {num}).")
    if not 0 <= seed < 2**30:
        raise UserError(f"seed must be from 0 to {2**30 - 1} (got {seed}).")
    if temperature < 0:
        raise UserError(f"temperature must be at least 0 (got {temperature:g}).")
    net, _ = load_likelihood_net(model)
    device = device or launched_device()
    net.to(device)  # type: ignore[attr-defined]
    chosen: dict[str, Any] = {}
    if class_name is not None:
        chosen = {"classes": torch.tensor([number_of_class(net, class_name)], device=device)}
    check_new_folder(out)

    paths, shown = list[Path](), []
    for number in tqdm(range(num), desc=model.name, unit="pictures", disable=None):
        draws = torch.Generator(device).manual_seed(seed * 2**32 + number)
        image = net.sample(1, temperature=temperature, generator=draws, **chosen)
        paths.append(out / f"{number:05d}.png")
        to_pil(image)[0].save(paths[-1])
        if number < GRID_IMAGES:
            shown.append(image.cpu())
    save_grid(torch.cat(shown), out / GRID_NAME)
    return paths
