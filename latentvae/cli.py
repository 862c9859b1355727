"""`latentvae`: the commands beside the training scripts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from latentvae.errors import UserError, nearest
from latentvae.flags import exit_with, parse_options


@dataclass(frozen=True)
class Reconstruct:
    """Run images through an autoencoder: side-by-side pictures and a table."""

    model: Positional[str]
    """Folder of a diffusers AutoencoderKL, such as a run's export."""

    inputs: Annotated[tuple[str, ...], Positional]
    """Images and folders of images, of any sizes."""

    out: Path
    """Folder for the pictures (original, reconstruction, difference) and table.csv."""

    max_side: int | None = None
    """Shrink larger images to so many pixels on the longer side, where memory is short."""

    def run(self) -> None:
        from latentvae.reconstruct import reconstruct

        reconstruct(self.model, self.inputs, out=self.out, max_side=self.max_side)


@dataclass(frozen=True)
class Export:
    """Write the diffusers folder of a run's newest checkpoint, with scaling and shift measured."""

    folder: Annotated[Path, Positional]
    """Folder of a training run."""

    out: Path
    """Folder to write; `AutoencoderKL.from_pretrained` loads it."""

    overwrite: bool = False
    """Replace the export that is in `out`."""

    def run(self) -> None:
        from latentvae.training.exporting import export_folder

        export_folder(self.folder, out=self.out, overwrite=self.overwrite)


COMMANDS: dict[str, type[Reconstruct] | type[Export]] = {
    "reconstruct": Reconstruct,
    "export": Export,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; a wrong argument is told in one sentence and exits with 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    try:
        command = _command(arguments)
        parse_options(command, arguments[1:], prog=f"latentvae {arguments[0]}").run()
    except UserError as error:
        exit_with(error)


def _command(arguments: Sequence[str]) -> type[Reconstruct] | type[Export]:
    names = ", ".join(COMMANDS)
    if not arguments:
        raise UserError(f"a command is missing: {names}; `latentvae --help` explains them")
    if arguments[0] not in COMMANDS:
        close = nearest(arguments[0], COMMANDS)
        raise UserError(f"there is no command '{arguments[0]}', only {names}{close}")
    return COMMANDS[arguments[0]]


def _overview() -> str:
    lines = [f"  latentvae {name:<12} {command.__doc__}" for name, command in COMMANDS.items()]
    train = "  train/train_kl.py       Train an autoencoder (a script, for `accelerate launch`)."
    return "\n".join(["Commands (each has --help):", *lines, train])


if __name__ == "__main__":
    main()
