"""Check the arguments of an evaluation, and the sizes of its images, before any measurement."""

from collections.abc import Collection, Mapping

from latentvae.autoencoder import Autoencoder
from latentvae.coding.image_codecs import CODECS
from latentvae.data import UnreadableImage
from latentvae.errors import UserError
from latentvae.evaluation.picture_source import Pictures
from latentvae.evaluation.settings import Plan
from latentvae.losses.perceptual import PerceptualLoss


def check_options(
    models: Mapping[str, Autoencoder],
    lpips: Mapping[str, PerceptualLoss],
    *,
    plan: Plan,
    sheet_images: int,
) -> None:
    """Check the arguments of `evaluate`.

    Raises:
        UserError: an argument is wrong, or a model cannot be measured.
    """
    # the plan
    if sheet_images < 1:
        raise UserError(f"sheet_images must be at least 1 (got {sheet_images}).")
    if set(lpips) != set(plan.lpips_nets):
        raise UserError(f"lpips needs the backbones {plan.lpips_nets} (got {tuple(lpips)}).")

    # the models
    if not models:
        raise UserError("there is no model to measure. Give at least one model.")
    for name, model in models.items():
        if model.image_channels != 3:
            raise UserError(
                f"evaluate needs RGB models, because the codecs need RGB images ('{name}' takes "
                f"{model.image_channels} channels). `latentvae reconstruct` measures PSNR, SSIM "
                "and LPIPS of any model."
            )

    # names of the models
    if clash := sorted(models.keys() & CODECS.keys()):
        raise UserError(
            f"a model cannot be called '{clash[0]}', because a codec has this name. "
            "Rename the model's folder."
        )


def check_names(models: Collection[str], linear: Collection[str]) -> None:
    """Check that no model has the name that a linear code (PCA of patches) has in the report.

    Raises:
        UserError: a model has the name of a linear code.
    """
    for name in linear:
        if name in models:
            raise UserError(
                f"a model cannot be called '{name}', because the linear code (PCA of patches) "
                "has this name. Rename the model's folder."
            )


def check_resolution(model: Autoencoder, plan: Plan) -> None:
    """Check that a model can process images of the plan's resolution.

    Raises:
        UserError: the resolution is too small for the model, or the model only makes images of one
            size and the plan does not resize all images to this size.
    """
    only = model.fixed_size
    if only is not None and (plan.size != (only, only) or plan.buckets):
        raise UserError(
            f"'{model.name}' only makes {only} x {only} images. Measure with --resolution {only}."
        )
    if plan.size is not None and min(plan.size) < model.smallest_side:
        raise UserError(
            f"resolution must be at least {model.smallest_side}, the downsampling factor f of "
            f"'{model.name}' (got {plan.resolution})."
        )


def check_sides(pictures: Pictures, strictest: Autoencoder) -> None:
    """Check that no image is too small for a model. Read only the images' headers.

    A small image cannot be left out for one model only, because the models would then be compared
    on different images.

    Args:
        strictest: the model with the largest `smallest_side` (smallest image side in pixels).

    Raises:
        UserError: an image is too small.
    """
    least = strictest.smallest_side
    for position in range(len(pictures)):
        try:
            width, height = pictures.size(position)
        except UnreadableImage:
            continue  # the measurement reports this image later
        if min(width, height) < least:
            raise UserError(
                f"images must have at least {least} pixels on a side, the downsampling factor f of "
                f"'{strictest.name}' ('{pictures.name(position)}' has {width} x {height} pixels). "
                f"Remove this image, or resize all images with --resolution {least} or more."
            )
