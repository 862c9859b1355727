"""The command `latentvae latents`: pictures of an autoencoder's latent space."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from latentvae.errors import UserError

Use = Literal["interpolate", "neighbours", "attribute", "traverse"]


@dataclass(frozen=True)
class Latents:
    """Draw pictures of the latent space of an autoencoder with your images.

    `interpolate` draws the images between one image and the next: on a line and on an arc between
    their latents, and as a mix of their pixels. `neighbours` draws, for each image, the images with
    the most similar latents. `attribute` moves images towards a class, such as smiling faces.
    `traverse` moves an image along the principal components of the latents.

        latentvae latents runs/first/export interpolate --data photos --out walk
        latentvae latents runs/first/export attribute --data faces --attribute smiling --out smile

    The command writes a PNG and a JSON file, which are named after the kind of picture, such as
    interpolate.png.
    """

    model: Positional[str]
    """Folder or Hub id of an autoencoder, such as a run's export."""

    use: Positional[Use]
    """Kind of picture to draw. The text at the top of this help explains each kind."""

    data: str
    """Your images: a folder of images, of tar files or of tables (parquet, arrow), or a single tar
    file or table. You may also give `samples` (21 photos that are installed with latentvae),
    or owner/name of a data set on the Hub."""

    out: Path
    """Folder for the PNG and the JSON file."""

    resolution: Annotated[tuple[int, ...] | None, arg(metavar="PIXELS|HEIGHT WIDTH")] = None
    """Size in pixels: one number for a square, or height and width. Each image is resized to cover
    this size, and the centre is cropped. If the model supports only one image size, this size is
    the default. For all other models, the default is 256."""

    max_images: int = 200
    """Largest number of images to encode. If there are more images, this many are chosen at equal
    distances in the sorted list of names."""

    images: tuple[str, ...] = ()
    """Names of the images to draw, as paths inside the folder or archive that `--data` names. By
    default, `interpolate` and `neighbours` use images at equal distances in the sorted list of
    names. `attribute` uses images without the attribute, and `traverse` uses the first image."""

    count: int = 3
    """Number of image pairs (interpolate), of images (neighbours, attribute) or of principal
    components (traverse) in the picture. If you give `--images`, only traverse uses this number."""

    steps: int = 7
    """Number of images in a row: of steps from one image to the next (interpolate), of neighbours
    (neighbours), or of strengths with which an image is moved (attribute, traverse)."""

    attribute: str | None = None
    """For attribute: name of the class whose images have the attribute, such as smiling. The class
    of an image is its first-level folder."""

    against: str | None = None
    """For attribute: name of the class whose images do not have the attribute. By default, all
    images of the other classes are used."""

    label_column: str | None = None
    """For tables: name of the column that holds the class of each image. The default is `label`."""

    device: str | None = None
    """Torch device for the computation. The default is the GPU if there is one."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. By default, weights without a variant name are
    loaded. If the weights exist only in a single variant, this variant is loaded."""

    def run(self) -> None:
        """Encode the images, draw the picture and write the PNG and the JSON file."""
        self._check()

        from latentvae.latents import space_pictures
        from latentvae.latents.opening import open_model

        model = open_model(self.model, device=self.device, variant=self.variant)
        side = self.resolution or (model.fixed_size or space_pictures.SIDE,)
        encoded = space_pictures.encode_images(
            model,
            self.data,
            resolution=(side[0], side[-1]),
            max_images=self.max_images,
            also=self.images,
            label_column=self.label_column,
        )
        path = self.out / f"{self.use}.png"
        options: dict[str, Any] = {"images": self.images, "count": self.count, "steps": self.steps}
        if self.use == "attribute":
            options |= {"attribute": self.attribute, "against": self.against}
        draw = {
            "interpolate": space_pictures.draw_interpolations,
            "neighbours": space_pictures.draw_neighbours,
            "attribute": space_pictures.draw_attribute,
            "traverse": space_pictures.draw_components,
        }[self.use]
        found = draw(encoded, path, **options)
        values = {"model": self.model, "data": self.data, **found}
        path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if self.use == "attribute":
            print(
                f"{100 * found['test_accuracy']:.0f} % of the images that were not used to compute "
                "the direction are classified correctly (50 % is guessing)"
            )
        print(f"{len(encoded.names)} images encoded, {path} written")

    def _check(self) -> None:
        for name, least in (("max_images", 2), ("count", 1), ("steps", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least} (got {getattr(self, name)}).")
        sides = self.resolution
        if sides is not None and (len(sides) not in (1, 2) or min(sides) < 1):
            raise UserError(
                "resolution must be one number of pixels, or height and width, each at least 1 "
                f"(got {' '.join(map(str, sides))})."
            )
        if self.use == "attribute" and self.attribute is None:
            raise UserError(
                "the picture attribute needs --attribute: the class of the images with the "
                "attribute, such as --attribute smiling for the folder faces/smiling."
            )
        if self.use != "attribute" and (self.attribute or self.against):
            raise UserError(
                f"{self.use} does not use --attribute or --against. Leave out both "
                "options, or choose attribute as the kind of picture."
            )
