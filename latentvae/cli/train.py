"""Flags for the training scripts: `--config` names the preset, every option of the schema is a flag
that overrides it.

tyro reads the flags and writes the help; pydantic judges the values, so that every fault is told in
one sentence.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latentvae.cli.flags import (
    check_names,
    exit_with,
    forget_output,
    one_sentence_errors,
    say_once,
    settled_output,
    unknown_flags,
)
from latentvae.config.presets import Config, load_preset, parse, preset_names
from latentvae.config.run_config import JobConfig, flat
from latentvae.engine.task import Task
from latentvae.errors import RunError, UserError
from latentvae.option_marks import ChosenByPreset, Elsewhere, marked, marks
from latentvae.tasks.autoencoder.config import TrainConfig

PREFLIGHT = "--preflight"  # a switch of the training scripts beside the options of the run


def config_from_arguments(
    arguments: Sequence[str],
    *,
    description: str,
    schema: type[Config] = TrainConfig,
    default_config: str = "kl_small",
    also: Sequence[str] = (),
) -> Config:
    """Return the options that the command line asks for.

    Args:
        description: of the script, for its help.
        schema: of the task.
        default_config: the preset without `--config`; empty for the defaults of the schema.
        also: options that the command has beside these and has read already; a wrong one may have
            been meant for one of them.

    Raises:
        UserError: an unknown flag, or a value that is not allowed.
        SystemExit: after `--help`.
    """
    arguments = list(arguments)
    name = _config_flag(arguments) or default_config
    preset = load_preset(name, schema) if name else schema()
    if "-h" in arguments or "--help" in arguments:
        _read_flags(preset, ["--help"], description=description)
    _check_flags(arguments, preset, also=also)
    with one_sentence_errors():
        flags = _read_flags(preset, arguments, description=description)
    return parse(dataclasses.asdict(flags), schema, source="command line")


def _check_flags(arguments: Sequence[str], preset: JobConfig, *, also: Sequence[str] = ()) -> None:
    """Refuse unknown flags: those of other presets, and other trainers' names, with what to give
    here."""
    chosen = marked(type(preset), ChosenByPreset)
    names = [name for name in flat(preset) if name not in chosen]
    elsewhere = marks(type(preset), Elsewhere)
    ours = {other: name for name, mark in elsewhere.items() for other in mark.names.split()}
    for flag, given in unknown_flags(arguments, names):
        given = given.rpartition(".")[2].removeprefix("no_")
        name = ours.get(given, given)
        if name in names:
            raise UserError(f"unknown option '{flag}'; did you mean '--{name}'?")
        if name in chosen:
            kinds = _kinds(name, type(preset))
            raise UserError(
                f"unknown option '{flag}': --config chooses it, a preset ({kinds}) or a "
                "YAML file of your own"
            )
        presets = [p for p, values in _presets(type(preset)).items() if name in values]
        if presets:
            called = "" if name == given else f" (here '--{name}')"
            raise UserError(
                f"option '{flag}'{called} has no meaning for config {preset.config}; presets that "
                f"have it: {', '.join(presets)}"
            )
    check_names(arguments, [*names, *also])


def _presets(schema: type[JobConfig]) -> dict[str, dict[str, Any]]:
    """Every preset of a task and its options by their leaf names."""
    return {name: flat(load_preset(name, schema)) for name in preset_names(schema)}


def _kinds(name: str, schema: type[JobConfig]) -> str:
    """Which presets have which architecture or type of quantiser."""
    kinds: dict[str, list[str]] = {}
    for preset, values in _presets(schema).items():
        if kind := values.get(name):
            kinds.setdefault(kind, []).append(preset)
    return "; ".join(f"{kind}: {', '.join(presets)}" for kind, presets in sorted(kinds.items()))


def _read_flags(preset: JobConfig, arguments: list[str], *, description: str) -> Any:
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
    chosen = marked(type(section), ChosenByPreset)
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if name in chosen:
            fields.append((name, tyro.conf.Suppress[str], dataclasses.field(default=value)))
        elif isinstance(value, BaseModel):
            nested = _flags_of(value)
            fields.append((name, nested, dataclasses.field(default_factory=nested)))
        else:
            text = info.description or ""
            if isinstance(section, JobConfig) and name == "config":
                text = f"{text} Presets: {', '.join(preset_names(type(section))) or 'none'}."
            fields.append((name, _flag_type(info, text), dataclasses.field(default=value)))
    flags = dataclasses.make_dataclass(type(section).__name__, fields)
    flags.__doc__ = type(section).__doc__
    return flags


def _flag_type(info: FieldInfo, text: str) -> Any:
    """The type tyro parses: choices become strings (pydantic refuses wrong ones) whose help lists
    them.

    Args:
        text: the help.
    """
    choices = _choices(info.annotation)
    if choices and get_origin(info.annotation) is tuple:
        metavar = f"[{'|'.join(choices)} ...]"
        return Annotated[tuple[str, ...], tyro.conf.arg(help=text, metavar=metavar)]
    if choices:
        return Annotated[str | None, tyro.conf.arg(help=text, metavar="|".join(choices))]
    return Annotated[info.annotation, tyro.conf.arg(help=text)]


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _config_flag(arguments: list[str]) -> str | None:
    given = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    given += [after for a, after in itertools.pairwise(arguments) if a == "--config"]
    if len(given) > 1:
        raise UserError(f"--config is given {len(given)} times: {', '.join(given)}; give one")
    return given[0] if given else None


def run_training(
    arguments: Sequence[str], *, description: str, default_config: str = "kl_small"
) -> None:
    """The whole of an autoencoder's training script, see `run_task`.

    With `--preflight` the run is only checked (`proofs.preflight`): 0 if all holds, else 1.
    """
    from latentvae.proofs.preflight import preflight
    from latentvae.tasks.autoencoder.task import AutoencoderTask

    run_task(
        AutoencoderTask,
        arguments,
        description=description,
        default_config=default_config,
        preflight=preflight,
    )


def run_task(
    task: type[Task],
    arguments: Sequence[str],
    *,
    description: str,
    default_config: str = "",
    preflight: Callable[[Any], int] | None = None,
) -> None:
    """The whole of a training script: flags in, export out.

    Exits with 2 on a wrong option, 128 + n after signal n, 1 if the run failed or all is done but
    the upload to the Hub.

    Args:
        task: what is trained.
        arguments: of the command line.
        description: of the script, for its help.
        default_config: the preset without `--config`.
        preflight: checks a configuration in place of the run, where `--preflight` asks for it.
    """
    with settled_output():
        _run(task, arguments, description, default_config, preflight)


def _run(
    task: type[Task],
    arguments: Sequence[str],
    description: str,
    default_config: str,
    preflight: Callable[[Any], int] | None,
) -> None:
    from latentvae.data import UnreadableImage
    from latentvae.engine.loop import Stopped, train
    from latentvae.export.hub_upload import UploadError

    switches = [PREFLIGHT] if preflight is not None else []
    try:
        config = config_from_arguments(
            [argument for argument in arguments if argument not in switches],
            description=description,
            schema=task.config_class,
            default_config=default_config,
            also=[switch.removeprefix("--") for switch in switches],
        )
        if preflight is not None and PREFLIGHT in arguments:
            raise SystemExit(preflight(config))
        trained = task(config)
        export = train(trained)
    except UnreadableImage as error:  # met by one rank alone, unlike every other UserError
        print(f"error: process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except UserError as error:
        exit_with(error)
    except RunError as error:  # may be of one rank alone
        print(f"error: process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        if not forget_output():
            raise
        say_once(
            "error: nothing reads what this run prints any more; the same command goes on from the "
            "newest checkpoint (`> log.txt 2>&1` in the place of a pipe outlives its reader)"
        )
        raise SystemExit(1) from None
    except UploadError as error:
        say_once(f"error: {error}, or run the same command again")
        raise SystemExit(1) from None
    except Stopped as stopped:
        say_once(str(stopped))
        raise SystemExit(128 + stopped.signal) from None
    say_once(trained.done(export))


if __name__ == "__main__":  # `accelerate launch -m latentvae.cli.train`, where there are no scripts
    run_training(sys.argv[1:], description="Train an autoencoder; --config takes every preset.")
