"""The training scripts: their flags, and what they print and exit with.

`--config` names a preset or a YAML file. Every option is also a flag, which overrides the config.
tyro reads the flags and writes the help. pydantic checks the values, and each wrong one becomes one
sentence.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latentvae.cli.flags import (
    check_names,
    check_switches,
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

PREFLIGHT = "--preflight"  # a flag of the training scripts that is no option of the run


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
        arguments: of the command line.
        description: of the script, for its help.
        schema: class of the options of the task.
        default_config: preset to use without `--config`. If empty, the defaults of the schema.
        also: names of other options of the command, which were read before. A wrong flag may have
            been meant for one of them.

    Raises:
        UserError: an unknown flag, or a value that is not allowed.
        SystemExit: after `--help`.
    """
    # the preset, whose values are the defaults of the flags
    arguments = list(arguments)
    name = _config_flag(arguments) or default_config
    preset = load_preset(name, schema) if name else schema()
    if "-h" in arguments or "--help" in arguments:
        _read_flags(preset, ["--help"], description=description)

    # the flags
    _check_flags(arguments, preset, also=also)
    with one_sentence_errors():
        flags = _read_flags(preset, arguments, description=description)
    return parse(dataclasses.asdict(flags), schema, source="command line")


def _check_flags(arguments: Sequence[str], preset: JobConfig, *, also: Sequence[str] = ()) -> None:
    """Check that the config has all these flags.

    Raises:
        UserError: an unknown flag, an option that only other presets have, or another trainer's
            name for an option. It says what to give instead.
    """
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
            raise UserError(
                f"unknown option '{flag}': --config chooses it, with a preset "
                f"({_kinds(name, type(preset))}) or your own YAML file"
            )
        called = f"'{flag}'" if name == given else f"'{flag}' (here '--{name}')"
        _refuse_option_of_others(name, preset, called=called)
    check_names(arguments, [*names, *also])
    switches = [name for name, value in flat(preset).items() if isinstance(value, bool)]
    check_switches(arguments, switches)


def _refuse_option_of_others(name: str, preset: JobConfig, *, called: str) -> None:
    presets = [other for other, values in _presets(type(preset)).items() if name in values]
    if presets:
        raise UserError(
            f"option {called} has no meaning for config {preset.config}, only for the presets "
            f"{', '.join(presets)}"
        )


def _presets(schema: type[JobConfig]) -> dict[str, dict[str, Any]]:
    """Return every preset of a task, with its options by their leaf names."""
    return {name: flat(load_preset(name, schema)) for name in preset_names(schema)}


def _kinds(name: str, schema: type[JobConfig]) -> str:
    """Return, as text, which presets have which architecture or type of quantiser."""
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
    """Return a dataclass for tyro. Its fields are the options, its defaults their present values.

    It has no ranges, because pydantic checks the values later.
    """
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
    """Return the type that tyro parses.

    Choices become strings, so that pydantic reports wrong ones. The help lists them.

    Args:
        info: the option's field.
        text: its help.
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
        raise UserError(f"--config is given {len(given)} times: {', '.join(given)}. Give it once.")
    return given[0] if given else None


def run_training(
    arguments: Sequence[str], *, description: str, default_config: str = "kl_small"
) -> None:
    """Run the training script of an autoencoder, see `run_task`.

    With `--preflight` the run is only checked, see `proofs.preflight`.
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
    """Run a training script: read the flags, train, export.

    It exits with 2 on a wrong option and with 128 + n after signal n. It exits with 1 if the run
    failed, or if only the upload to the Hub failed.

    Args:
        task: what is trained.
        arguments: of the command line.
        description: of the script, for its help.
        default_config: preset to use without `--config`.
        preflight: checks the run if `--preflight` is given, and returns the exit code.
    """
    switches = [PREFLIGHT] if preflight is not None else []
    with settled_output(), _faults_as_exit_codes():
        # options
        config = config_from_arguments(
            [argument for argument in arguments if argument not in switches],
            description=description,
            schema=task.config_class,
            default_config=default_config,
            also=[switch.removeprefix("--") for switch in switches],
        )
        if preflight is not None and PREFLIGHT in arguments:
            raise SystemExit(preflight(config))

        # training
        from latentvae.engine.loop import train

        trained = task(config)
        export = train(trained)
        say_once(trained.done(export))


@contextlib.contextmanager
def _faults_as_exit_codes() -> Iterator[None]:
    """Print what ended a training script in one line, and exit with its code."""
    from latentvae.data import UnreadableImage
    from latentvae.engine.loop import Stopped
    from latentvae.export.hub_upload import UploadError

    try:
        yield

    # These faults may be in one process only, so each process prints its own.
    except UnreadableImage as error:
        print(f"error: process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RunError as error:
        print(f"error: process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(1) from None

    # All processes have these faults, and the first one prints them.
    except UserError as error:
        exit_with(error)
    except BrokenPipeError:
        if not forget_output():
            raise
        say_once(
            "error: nothing reads the output of this run any more. Run the same command again to "
            "continue from the newest checkpoint (with `> log.txt 2>&1` instead of a pipe, the run "
            "does not depend on a reader)"
        )
        raise SystemExit(1) from None
    except UploadError as error:
        say_once(f"error: {error}, or run the same command again")
        raise SystemExit(1) from None
    except Stopped as stopped:
        say_once(str(stopped))
        raise SystemExit(128 + stopped.signal) from None


# `accelerate launch -m latentvae.cli.train` works where only the wheel is installed.
if __name__ == "__main__":
    run_training(sys.argv[1:], description="Train an autoencoder. --config takes every preset.")
