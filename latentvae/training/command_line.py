"""Flags for the training scripts: `--config` names the preset, every option of the schema is a flag
that overrides it.

tyro reads the flags and writes the help; pydantic judges the values, so that every fault is told in
one sentence.
"""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latentvae.errors import UserError, nearest
from latentvae.training.config import TrainConfig, option_names
from latentvae.training.presets import load_preset, parse


def config_from_arguments(arguments: Sequence[str], *, description: str) -> TrainConfig:
    """The run that the command line asks for.

    Raises:
        UserError: an unknown flag, or a value that is not allowed.
        SystemExit: after `--help`.
    """
    arguments = list(arguments)
    preset = load_preset(_config_flag(arguments))
    if "-h" in arguments or "--help" in arguments:
        _read_flags(preset, ["--help"], description=description)
    _check_names(arguments)
    printed = _Captured()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            flags = _read_flags(preset, arguments, description=description)
    except SystemExit as error:
        raise UserError(printed.sentence()) from error
    return parse(dataclasses.asdict(flags), source="command line")


def exit_with(error: UserError) -> NoReturn:
    """Print the one sentence and exit with 2."""
    say_once(f"error: {error}")
    raise SystemExit(2)


def say_once(text: str) -> None:
    """Print to stderr from one rank only; launchers set LOCAL_RANK before ranks know each other."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def _read_flags(preset: TrainConfig, arguments: list[str], *, description: str) -> Any:
    return tyro.cli(
        _flags_of(preset),
        args=arguments,
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
        use_underscores=True,
    )


def _flags_of(section: BaseModel) -> type:
    """A plain dataclass with the options of ``section`` as fields, for tyro: no ranges, the present
    values as defaults."""
    fields: list[Any] = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            nested = _flags_of(value)
            fields.append((name, nested, dataclasses.field(default_factory=nested)))
        else:
            fields.append((name, _flag_type(info), dataclasses.field(default=value)))
    flags = dataclasses.make_dataclass(type(section).__name__, fields)
    flags.__doc__ = type(section).__doc__
    return flags


def _flag_type(info: FieldInfo) -> Any:
    """The type tyro parses: choices become strings (pydantic refuses wrong ones) whose help lists
    them."""
    text = info.description or ""
    choices = _choices(info.annotation)
    if choices:
        return Annotated[str | None, tyro.conf.arg(help=text, metavar="|".join(choices))]
    return Annotated[info.annotation, tyro.conf.arg(help=text)]


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _config_flag(arguments: list[str]) -> str:
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
    return TrainConfig().config


def _check_names(arguments: list[str]) -> None:
    """Refuse unknown flags, naming the nearest one."""
    names = option_names()
    for argument in arguments:
        flag = argument.split("=")[0]
        name = flag[2:].replace("-", "_").removeprefix("no_")
        if flag.startswith("--") and name not in names:
            close = nearest(name, names).replace("'", "'--", 1)
            raise UserError(f"unknown option '{flag}'{close or '; `--help` lists them all'}")


class _Captured(io.StringIO):
    """What tyro prints in a box when a value does not parse."""

    encoding = "utf-8"  # type: ignore[assignment]

    def sentence(self) -> str:
        """The message without frame, heading and the help below it."""
        message: list[str] = []
        for line in self.getvalue().splitlines():
            text = line.strip("│| ").strip()
            if text.startswith("──") or text.startswith("--- "):
                break
            if not text.startswith("╭"):
                message.append(text)
        return " ".join(message) or self.getvalue()


def run_training(arguments: Sequence[str], *, description: str) -> None:
    """The whole of a training script: flags in, export out; exits with 2 on a wrong option, 128 + n
    after signal n."""
    from latentvae.training.loop import Stopped, train

    try:
        export = train(config_from_arguments(arguments, description=description))
    except UserError as error:
        exit_with(error)
    except Stopped as stopped:
        say_once(str(stopped))
        raise SystemExit(128 + stopped.signal) from None
    say_once(f"done: {export} loads with diffusers.AutoencoderKL.from_pretrained('{export}')")
