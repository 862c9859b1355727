"""Run the training scripts: read flags, print messages and set exit codes.

`--config` names a preset or a YAML file. Every option is also a flag, which overrides the value in
the preset or file, except a few options that only a preset or file can set. tyro reads the flags
and writes the help. pydantic checks the values, and each wrong value is reported in one sentence.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tyro

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
from latentvae.cli.option_list import (
    HIDDEN,
    Group,
    describe,
    describe_presets,
    flags_class,
    names_elsewhere,
    read_list,
)
from latentvae.config.presets import presets_folder, unknown_config
from latentvae.config.recipes import FLAG, take_recipe, with_recipe
from latentvae.errors import RunError, UserError, nearest

if TYPE_CHECKING:
    from latentvae.config.run_config import JobConfig
    from latentvae.engine.task import Task

Config = TypeVar("Config", bound="JobConfig")

PREFLIGHT = "--preflight"  # a flag of the training scripts, but no option of the run


def config_from_arguments(
    arguments: Sequence[str],
    *,
    description: str,
    schema: "type[Config] | None" = None,
    default_config: str = "kl_small",
    also: Sequence[str] = (),
) -> "Config":
    """Return all options of a run, from its config and the flags of the command line.

    Args:
        arguments: arguments of the command line.
        description: description of the script, for its help.
        schema: class of the task's options. With None, this is `TrainConfig`, the options of
            autoencoders.
        default_config: preset to use without `--config`. If this name is empty, the defaults of the
            schema are used.
        also: names of other options of the command, which are not in `arguments`. The error about
            an unknown flag suggests the most similar name, which can be one of these names.

    Raises:
        UserError: a flag is unknown, or a value is not allowed.
        SystemExit: after `--help`.
    """
    # For autoencoders, wrong flags are reported before the slow import of the option classes.
    if schema is None:
        check_early(arguments, description=description, default_config=default_config, also=also)
        from latentvae.tasks.autoencoder.config import TrainConfig

        schema = cast("type[Config]", TrainConfig)

    # the preset, whose values are the defaults of the flags
    from latentvae.config.presets import load_preset, parse

    arguments, recipe = take_recipe(arguments)
    name = _config_flag(arguments) or default_config
    steps = _max_train_steps(arguments)
    preset = load_preset(name, schema, max_train_steps=steps) if name else schema()
    preset = preset if recipe is None else with_recipe(preset, recipe)

    # the flags
    flags = _read_options(
        arguments,
        describe(preset),
        description=description,
        config=preset.config,
        elsewhere=names_elsewhere(schema),
        presets=lambda: describe_presets(schema),
        also=also,
    )
    return parse(dataclasses.asdict(flags), schema, source="command line")


def check_early(
    arguments: Sequence[str],
    *,
    description: str,
    default_config: str = "kl_small",
    also: Sequence[str] = (),
) -> None:
    """Print the help or report wrong flags, before anything slow is imported.

    The function does nothing if the config is a YAML file outside the folder of presets, or if
    options.json (the list of options) is missing or out of date. `config_from_arguments` takes the
    same arguments and checks all flags again.
    """
    # the preset, by its name or its file
    arguments, listed = take_recipe(arguments)[0], read_list()
    name = _config_flag(arguments) or default_config
    path = Path(name)
    if path.is_file() and path.resolve().parent == presets_folder().resolve():
        name = path.stem
    elif path.is_file():
        return
    if listed is None or not name:
        return
    if name not in listed.presets:
        raise unknown_config(name, listed.presets)

    # the flags
    group, presets = listed.presets[name], listed.presets
    flags = _read_options(
        arguments,
        group,
        description=description,
        config=name,
        elsewhere=listed.elsewhere,
        presets=lambda: presets,
        also=also,
    )
    _check_choices(group, dataclasses.asdict(flags))


def _check_choices(group: Group, values: Mapping[str, Any]) -> None:
    """Raise a UserError if a value is not one of its option's choices."""
    for member in group.members:
        given = values[member.name]
        if isinstance(member, Group):
            _check_choices(member, given)
            continue
        for value in given if member.kind == "choices" else (given,):
            if member.choices and value is not None and value not in member.choices:
                *first, last = map(repr, member.choices)
                allowed = f"{', '.join(first)} or {last}" if first else last
                raise UserError(
                    f"command line: {member.name} is {value!r}, but should be {allowed}"
                    f"{nearest(str(value), member.choices)}"
                )


def _read_options(
    arguments: list[str],
    group: Group,
    *,
    description: str,
    config: str,
    elsewhere: Mapping[str, str],
    presets: Callable[[], Mapping[str, Group]],
    also: Sequence[str],
) -> Any:
    if "-h" in arguments or "--help" in arguments:
        _read_flags(group, ["--help"], description=description)
    _check_flags(arguments, group, config=config, elsewhere=elsewhere, presets=presets, also=also)
    with one_sentence_errors():
        return _read_flags(group, arguments, description=description)


def _check_flags(
    arguments: Sequence[str],
    group: Group,
    *,
    config: str,
    elsewhere: Mapping[str, str],
    presets: Callable[[], Mapping[str, Group]],
    also: Sequence[str],
) -> None:
    """Check that every flag is an option of the chosen config.

    Raises:
        UserError: a flag is unknown, belongs only to other presets, or is the name of an option in
            another training program. The error's message says which flag or config to give.
    """
    visible = [option for option in group.options() if option.kind != HIDDEN]
    chosen = {option.name for option in group.options() if option.kind == HIDDEN}
    names = [option.name for option in visible]

    for flag, given in unknown_flags(arguments, names):
        given = given.rpartition(".")[2].removeprefix("no_")
        name = elsewhere.get(given, given)
        if name in names:
            raise UserError(f"unknown option '{flag}'; did you mean '--{name}'?")
        called = f"'{flag}'" if name == given else f"'{flag}' (here '--{name}')"
        _check_option_of_others(name, chosen, presets(), config=config, called=called)
    check_names(arguments, [*names, *also, FLAG.removeprefix("--")])
    check_switches(arguments, [option.name for option in visible if option.kind == "bool"])


def _check_option_of_others(
    name: str, chosen: set[str], presets: Mapping[str, Group], *, config: str, called: str
) -> None:
    """Raise a UserError if only --config can set the option, or if only other presets have it."""
    found = {
        preset: option
        for preset, group in presets.items()
        for option in group.options()
        if option.name == name
    }
    if name in chosen:
        kinds: dict[str, list[str]] = {}
        for preset, option in found.items():
            kinds.setdefault(option.value, []).append(preset)
        listed = "; ".join(f"{kind}: {', '.join(kinds[kind])}" for kind in sorted(kinds))
        raise UserError(
            f"unknown option {called}: --config sets this option, with a preset ({listed}) or "
            "your own YAML file"
        )
    if found:
        raise UserError(
            f"option {called} has no meaning for config {config}, only for the presets "
            f"{', '.join(found)}"
        )


def _read_flags(group: Group, arguments: list[str], *, description: str) -> Any:
    return tyro.cli(
        flags_class(group),
        args=arguments,
        description=description,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.AvoidSubcommands,
            tyro.conf.HelptextFromCommentsOff,  # tyro would parse source files, which takes time
        ),
        use_underscores=True,
    )


def _config_flag(arguments: list[str]) -> str | None:
    given = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    given += [after for a, after in itertools.pairwise(arguments) if a == "--config"]
    if len(given) > 1:
        raise UserError(f"--config is given {len(given)} times: {', '.join(given)}. Give it once.")
    return given[0] if given else None


def _max_train_steps(arguments: list[str]) -> int | None:
    """Return the value of --max_train_steps, or None.

    Other options can be given as a fraction of this value.
    """
    flag = "--max_train_steps"
    given = [a.removeprefix(f"{flag}=") for a in arguments if a.startswith(f"{flag}=")]
    given += [after for a, after in itertools.pairwise(arguments) if a == flag]
    # A wrong value is reported when the flags are read.
    return int(given[-1]) if given and given[-1].isdecimal() and int(given[-1]) else None


def run_training(
    arguments: Sequence[str], *, description: str, default_config: str = "kl_small"
) -> None:
    """Run the training script of an autoencoder, see `run_task`.

    With `--preflight`, the script only checks the run (see `proofs.preflight`).
    """
    with settled_output():
        try:
            options = [argument for argument in arguments if argument != PREFLIGHT]
            check_early(
                options,
                description=description,
                default_config=default_config,
                also=[PREFLIGHT.removeprefix("--")],
            )
        except UserError as error:
            exit_with(error)

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
    task: "type[Task]",
    arguments: Sequence[str],
    *,
    description: str,
    default_config: str = "",
    preflight: Callable[[Any], int] | None = None,
) -> None:
    """Run a training script: read the flags, train, export.

    The exit code is 2 after a wrong option or wrong data, and 128 + n after signal n. The exit code
    is 1 if the run failed, or if only the upload to the Hub failed.

    Args:
        task: class of the task to train.
        arguments: arguments of the command line.
        description: description of the script, for its help.
        default_config: preset to use without `--config`.
        preflight: function that checks the run if `--preflight` is given, and returns the exit
            code.
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
    """Print the error of a training script in one line, and set the exit code (see `run_task`)."""
    from latentvae.data import UnreadableImage
    from latentvae.engine.loop import Stopped
    from latentvae.export.hub_upload import UploadError

    try:
        yield

    # These errors may occur in one process only, so each process prints its own.
    except UnreadableImage as error:
        print(f"error: process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RunError as error:
        print(f"error: process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(1) from None

    # These errors occur in all processes, and the first process prints them.
    except UserError as error:
        exit_with(error)
    except BrokenPipeError:
        if not forget_output():
            raise
        say_once(
            "error: nothing reads the output of this run any more, so the run has stopped. Run the "
            "same command again to continue from the newest checkpoint. With `> log.txt 2>&1` "
            "instead of a pipe, the run does not depend on another program."
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
