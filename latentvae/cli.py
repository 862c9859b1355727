"""`latentvae`: the commands beside the training scripts."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from latentvae.errors import UserError, nearest

app = tyro.extras.SubcommandApp()


@app.command
def reconstruct(
    model: Annotated[str, tyro.conf.Positional],
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    out: Path,
) -> None:
    """Run images through an autoencoder: side-by-side pictures and a table.

    Args:
        model: Folder of a diffusers AutoencoderKL, such as a run's export.
        inputs: Images and folders of images, of any sizes.
        out: Folder for the pictures (original, reconstruction, difference) and table.csv.
    """
    from latentvae.reconstruct import reconstruct as run

    run(model, inputs, out=out)


@app.command
def export(
    run: Annotated[Path, tyro.conf.Positional], *, out: Path, overwrite: bool = False
) -> None:
    """Write the diffusers folder of a run's newest checkpoint, with scaling and shift measured.

    Args:
        run: Folder of a training run.
        out: Folder to write; `AutoencoderKL.from_pretrained` loads it.
        overwrite: Replace what is in `out`.
    """
    from latentvae.training.exporting import export_folder

    export_folder(run, out=out, overwrite=overwrite)
    print(f"wrote {out}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a wrong argument is told in one sentence and exits with 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = ("reconstruct", "export")
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
            raise UserError(
                f"there is no command '{arguments[0]}', only "
                f"{', '.join(commands)}{nearest(arguments[0], commands)}"
            )
        app.cli(prog="latentvae", args=arguments, description=__doc__, use_underscores=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
