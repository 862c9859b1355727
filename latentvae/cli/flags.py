"""Parse command lines with tyro. A wrong argument gives a one-sentence error and exit code 2."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import select
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from latentvae.errors import UserError, nearest

Options = TypeVar("Options", bound=Any)

MIN_COLUMNS = 40
_SWITCH_VALUES = {"true": True, "yes": True, "on": True, "1": True}
_SWITCH_VALUES |= {"false": False, "no": False, "off": False, "0": False, "none": False}


def _sides_last(arguments: list[str]) -> list[str]:
    """Move `--resolution` and its one or two numbers to the end of the arguments.

    tyro would otherwise take a model's name after these numbers as another value of the flag.
    """
    flag = "--resolution"
    if arguments.count(flag) != 1:
        return arguments
    start = arguments.index(flag)
    end = start + 1
    while end < min(len(arguments), start + 3) and arguments[end].isdecimal():
        end += 1
    if end == start + 1:
        return arguments  # a wrong value, which is reported later
    return arguments[:start] + arguments[end:] + arguments[start:end]


def parse_options(
    options: type[Options], arguments: Sequence[str], *, prog: str, description: str | None = None
) -> Options:
    """Read flags into a dataclass.

    Args:
        options: the dataclass. Each field of this class is a flag or a positional argument.
        arguments: arguments of the command line.
        prog: name of the command, for its help.
        description: text for the help. By default, the docstring of the class `options` is shown.

    Raises:
        UserError: an option is unknown, missing or wrong. The error's message is one sentence.
        SystemExit: after `--help`.
    """
    # The help is what tyro prints. Errors of tyro are shortened to one sentence.
    arguments = list(arguments)
    if "-h" in arguments or "--help" in arguments:
        arguments, context = ["--help"], contextlib.nullcontext()
    else:
        fields = dataclasses.fields(options)
        arguments = _sides_last(arguments)
        check_names(arguments, [flag_name(field) for field in fields])
        check_switches(arguments, [field.name for field in fields if field.type is bool])
        context = one_sentence_errors()

    with context:
        return tyro.cli(
            options, args=arguments, prog=prog, description=description, use_underscores=True
        )


def flag_name(field: "dataclasses.Field[Any]") -> str:
    """Return the name of a field's flag: the name in `tyro.conf.arg`, or else the field's name."""
    marks = getattr(field.type, "__metadata__", ())
    return next((m.name for m in marks if getattr(m, "name", None)), field.name)


def parse_known(
    options: type[Options], arguments: Sequence[str], *, prog: str, description: str | None = None
) -> tuple[Options, list[str]]:
    """Read flags into a dataclass. Return the dataclass and the list of all other arguments.

    The arguments of this function are those of `parse_options`.

    Raises:
        UserError: an option is missing or wrong. The error's message is one sentence.
        SystemExit: after `--help`.
    """
    arguments = list(arguments)
    if "-h" in arguments or "--help" in arguments:
        return parse_options(options, ["--help"], prog=prog, description=description), []
    with one_sentence_errors():
        parsed, others = tyro.cli(
            options, args=arguments, prog=prog, use_underscores=True, return_unknown_args=True
        )
    return parsed, others


def check_switches(arguments: Sequence[str], names: Iterable[str]) -> None:
    """Check that no on-off flag has a value. For example, `--use_ema false` is an error.

    Args:
        arguments: arguments of the command line.
        names: names of on-off options, written with underscores.

    Raises:
        UserError: an on-off flag has a value. The error's message names the right flag, such as
            `--no_use_ema` for `--use_ema false`.
    """
    names = set(names)
    for argument, after in itertools.pairwise([*arguments, ""]):
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        plain = name if name in names else name.removeprefix("no_")
        if not flag.startswith("--") or plain not in names:
            continue
        value = value if equals else after  # without "=", the value may be another argument
        if value.lower() in _SWITCH_VALUES or equals:
            on = _SWITCH_VALUES.get(value.lower(), True) == (plain == name)
            wanted = f"--{plain}" if on else f"--no_{plain}"
            raise UserError(f"'{flag}' takes no value (got '{value}'); did you mean '{wanted}'?")


def check_names(arguments: Sequence[str], names: Iterable[str]) -> None:
    """Check that all flags are known.

    Args:
        arguments: arguments of the command line.
        names: names of allowed options, without leading dashes and with underscores.

    Raises:
        UserError: a flag is unknown. The error's message names the most similar known flag, if any.
    """
    names = list(names)
    for flag, name in unknown_flags(arguments, names):
        close = nearest(name, names).replace("'", "'--", 1)
        raise UserError(f"unknown option '{flag}'{close or '. `--help` lists all options.'}")


def unknown_flags(arguments: Sequence[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each unknown flag in two forms: as the user wrote it, and as the name of an option."""
    names = set(names)
    for argument in arguments:
        flag = argument.split("=")[0]
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name not in names and name.removeprefix("no_") not in names:
            yield flag, name


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Raise a UserError for an error that tyro would otherwise print in a box."""
    printed = _Captured()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            yield
    except SystemExit as error:
        raise UserError(printed.sentence()) from error


@contextlib.contextmanager
def settled_output() -> Iterator[None]:
    """Make stdout and stderr safe for the duration of a command.

    - A character that the locale cannot show is printed as an escape such as ``\\xe9``.
    - Output to a closed stdout or stderr is dropped.
    - If no program reads the output pipe any more, the exit code is 141 (SIGPIPE).
    - Help is at least ``MIN_COLUMNS`` characters wide. tyro needs minutes for narrower help.
    """
    # before the command
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # This file stays open until the process ends.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    # the command
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not forget_output():
            raise
        raise SystemExit(141) from None


def forget_output() -> bool:
    """Redirect stdout to the null device if no program reads stdout any more.

    Python flushes stdout once more when it exits. If no program reads stdout, this flush would
    raise an error.

    Returns:
        True if stdout was redirected. False if a program still reads stdout, or if stdout has no
        file descriptor: the caller's BrokenPipeError then has another cause.
    """
    try:
        stdout, poll = sys.stdout.fileno(), select.poll()
    except OSError:
        return False
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def exit_with(error: UserError) -> NoReturn:
    """Print the error in one line and exit with code 2."""
    say_once(f"error: {error}")
    raise SystemExit(2)


def say_once(text: str) -> None:
    """Print a text to stderr, in the first process of this machine only."""
    # Launchers set LOCAL_RANK, so this works before the processes can communicate.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


class _Captured(io.StringIO):
    """A stream that stores the text that tyro prints in a box."""

    encoding = "utf-8"  # type: ignore[assignment]

    def sentence(self) -> str:
        """Return the error message without the frame, the heading and the help that tyro adds."""
        message: list[str] = []
        for line in self.getvalue().splitlines():
            text = line.strip("│| ").strip()
            if text.startswith("──") or text.startswith("--- "):
                break
            if not text.startswith("╭"):
                message.append(text)
        text = re.sub(r"\[/?bold\]", "", " ".join(message))  # tyro leaves this markup in errors
        return text.partition("  Got errors:")[0] or self.getvalue()
