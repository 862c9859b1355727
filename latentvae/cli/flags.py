"""Command lines that tell every fault in one sentence and exit with 2; tyro does the parsing."""

import contextlib
import dataclasses
import io
import os
import select
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from latentvae.errors import UserError, nearest

Options = TypeVar("Options", bound=Any)

MIN_COLUMNS = 40


def parse_options(
    options: type[Options], arguments: Sequence[str], *, prog: str, description: str | None = None
) -> Options:
    """Read flags into a dataclass.

    Raises:
        UserError: an unknown, missing or wrong option, in one sentence.
        SystemExit: after `--help`.
    """
    arguments = list(arguments)
    if "-h" in arguments or "--help" in arguments:
        arguments, context = ["--help"], contextlib.nullcontext()
    else:
        check_names(arguments, [field.name for field in dataclasses.fields(options)])
        context = one_sentence_errors()
    with context:
        return tyro.cli(
            options, args=arguments, prog=prog, description=description, use_underscores=True
        )


def parse_known(
    options: type[Options], arguments: Sequence[str], *, prog: str, description: str | None = None
) -> tuple[Options, list[str]]:
    """Read the flags of a dataclass out of those of another command; returns the others too.

    Raises:
        UserError: a missing or wrong option, in one sentence.
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


def check_names(arguments: Sequence[str], names: Iterable[str]) -> None:
    """Refuse unknown flags, naming the nearest one.

    Args:
        names: options without their dashes, with underscores.
    """
    names = list(names)
    for flag, name in unknown_flags(arguments, names):
        close = nearest(name, names).replace("'", "'--", 1)
        raise UserError(f"unknown option '{flag}'{close or '; `--help` lists them all'}")


def unknown_flags(arguments: Sequence[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Flags that are none of the options, as they were written and as a name."""
    names = set(names)
    for argument in arguments:
        flag = argument.split("=")[0]
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name not in names and name.removeprefix("no_") not in names:
            yield flag, name


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn what tyro prints in a box, before it exits, into a UserError."""
    printed = _Captured()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            yield
    except SystemExit as error:
        raise UserError(printed.sentence()) from error


@contextlib.contextmanager
def settled_output() -> Iterator[None]:
    """For a whole command: names print in every locale (as ``\\xe9`` where it lacks the letter), a
    stream that is closed swallows what it is given, and a pipe that nothing reads any more ends the
    command with 141, as the shell has it for SIGPIPE. In a terminal of few columns help is laid out
    for ``MIN_COLUMNS``: for one column that would take minutes."""
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # for the process's life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
    """If nothing reads stdout any more, point it elsewhere, for Python flushes it once more at its
    end and would complain; else it was another pipe that broke, and this returns False."""
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
    """Print the one sentence and exit with 2."""
    say_once(f"error: {error}")
    raise SystemExit(2)


def say_once(text: str) -> None:
    """Print to stderr from one rank only; launchers set LOCAL_RANK before ranks know each other."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


class _Captured(io.StringIO):
    """What tyro prints in a box."""

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
