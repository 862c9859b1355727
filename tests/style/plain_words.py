"""Measure how readable the project's prose is, and say where it is not.

    python -m tests.style.plain_words            # list every place over a limit, exit 1 if any
    python -m tests.style.plain_words --table    # one row of figures per page and package

Prose is the text of the pages (without code and tables), docstrings, comments, and the sentences
that a program prints: help, errors, warnings. Three things are counted.

- Sentences over 40 words, and the share over 35.
- Semicolons per 100 sentences.
- Functions of 25 lines or more without a blank line after their docstring.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/**/*.md")
PACKAGES = ("latentvae", "train", "benchmarks")

MAX_WORDS = 40
LONG_WORDS, MAX_LONG_SHARE = 35, 0.05
MAX_SEMICOLONS = 10  # per 100 sentences
MAX_PAGE_LINES = 250
LONG_FUNCTION = 25
# Strings in code count as prose from this many words on: shorter ones are mostly keys and labels.
MIN_MESSAGE_WORDS = 6


@dataclass(frozen=True)
class Sentence:
    """One sentence and the line it starts at (in a page: its paragraph)."""

    line: int
    text: str

    @property
    def words(self) -> int:
        """Number of words. A word holds a letter or a digit."""
        return len(re.findall(r"\S*\w\S*", self.text))


@dataclass
class Measured:
    """What was found in one file.

    Attributes:
        sentences: all of its prose.
        long_functions: number of functions of `LONG_FUNCTION` lines or more.
        solid: (line, name) of those without a blank line.
        lines: length of a page. A Python file has no limit here.
    """

    sentences: list[Sentence] = field(default_factory=list)
    long_functions: int = 0
    solid: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.sentences + other.sentences,
            self.long_functions + other.long_functions,
            self.solid + other.solid,
            self.lines + other.lines,
        )

    @property
    def semicolons(self) -> float:
        """Semicolons per 100 sentences."""
        found = sum(sentence.text.count(";") for sentence in self.sentences)
        return 100 * found / max(1, len(self.sentences))

    @property
    def long_share(self) -> float:
        """Share of sentences over `LONG_WORDS` words."""
        found = sum(sentence.words > LONG_WORDS for sentence in self.sentences)
        return found / max(1, len(self.sentences))


def sentences(text: str, line: int = 1) -> Iterator[Sentence]:
    """Yield the sentences of one paragraph that starts at `line`."""
    flat = re.sub(r"`+[^`]*`+", "`code`", " ".join(text.split()))
    for part in re.split(r"(?<=[.!?])[)\"'*_]*\s+", flat):
        if part.strip():
            yield Sentence(line, part.strip())


def measure_page(text: str) -> Measured:
    """Measure a Markdown page. Code and tables do not count."""
    measured, in_table = Measured(lines=len(text.splitlines())), 0
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        in_table += {"table_open": 1, "table_close": -1}.get(token.type, 0)
        if token.type == "inline" and not in_table:
            start = token.map[0] + 1 if token.map else 1
            content = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", token.content)
            measured.sentences += sentences(content, start)
    return measured


def measure_source(source: str) -> Measured:
    """Measure the docstrings, comments, messages and long functions of a Python file."""
    tree, lines = ast.parse(source), source.splitlines()
    measured, docstrings = Measured(), set[int]()

    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                value = node.body[0].value  # type: ignore[union-attr]
                docstrings.add(id(value))
                measured.sentences += _docstring(value.value, value.lineno)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _count_function(node, lines, measured)

    measured.sentences += _messages(tree, docstrings)
    measured.sentences += _comments(source)
    return measured


def _docstring(text: str, line: int) -> Iterator[Sentence]:
    """An argument's description is a paragraph of its own, and indented examples are code."""
    paragraph: list[str] = []
    start, margin = line, _margin(text)
    for i, row in enumerate([*text.splitlines(), ""]):
        indent = len(row) - len(row.lstrip())
        item = re.match(r"\s*(?:[-*] |[\w*`, ]{1,60}: )", row)
        if not row.strip() or item:
            yield from sentences(" ".join(paragraph), start)
            paragraph, start = [], line + i
        example = indent == margin + 4 and not item and not paragraph
        if row.strip() and not example:
            paragraph.append(row.strip())


def _margin(text: str) -> int:
    rows = [row for row in text.splitlines()[1:] if row.strip()]
    return min((len(row) - len(row.lstrip()) for row in rows), default=0)


def _messages(tree: ast.AST, docstrings: set[int]) -> Iterator[Sentence]:
    """Yield the sentences of string constants, with `code` for what an f-string fills in."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
              for part in node.values}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [
                part.value if isinstance(part, ast.Constant) else "`code`" for part in node.values
            ]
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in docstrings | inside:
                continue
            text = node.value
        else:
            continue
        prose = len(re.findall(r"\b[a-zA-Z]{2,}\b", text)) >= MIN_MESSAGE_WORDS and "<" not in text
        if prose:
            for paragraph in text.split("\n"):
                yield from sentences(paragraph, node.lineno)


def _comments(source: str) -> Iterator[Sentence]:
    """Comments in adjacent lines are one paragraph."""
    paragraph: list[str] = []
    start = last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(
            r"#\s*(type:|noqa|fmt:|pyright:|!)", token.string
        ):
            continue
        if token.start[0] != last + 1:
            yield from sentences(" ".join(paragraph), start)
            paragraph, start = [], token.start[0]
        paragraph.append(token.string.lstrip("# "))
        last = token.start[0]
    yield from sentences(" ".join(paragraph), start)


def _count_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], measured: Measured
) -> None:
    size = (node.end_lineno or node.lineno) - node.lineno + 1
    if size < LONG_FUNCTION:
        return
    has_docstring = ast.get_docstring(node) is not None
    first = (node.body[0].end_lineno or node.lineno) if has_docstring else node.lineno
    measured.long_functions += 1
    if all(row.strip() for row in lines[first : node.end_lineno]):
        measured.solid.append((node.lineno, node.name))


def files() -> dict[str, Measured]:
    """Measure every page and every Python file, by its path from the root."""
    found = {}
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            found[str(path.relative_to(ROOT))] = measure_page(path.read_text())
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[str(path.relative_to(ROOT))] = measure_source(path.read_text())
    return found


def groups(measured: dict[str, Measured]) -> dict[str, Measured]:
    """Join the Python files of each folder two levels deep. Pages stay single."""
    joined: dict[str, Measured] = {}
    for name, one in measured.items():
        path = Path(name)
        key = name if path.suffix == ".md" else "/".join(path.parts[:-1][:2])
        joined[key] = joined.get(key, Measured()) + one
    return joined


def complaints(measured: dict[str, Measured]) -> list[str]:
    """List every place that is over a limit, one line each."""
    found = []
    for name, one in measured.items():
        for sentence in one.sentences:
            if sentence.words > MAX_WORDS:
                found.append(
                    f"{name}:{sentence.line}: {sentence.words} words: {sentence.text[:80]}..."
                )
        found += [f"{name}:{line}: {function} has no blank line" for line, function in one.solid]

    for name, one in groups(measured).items():
        if one.semicolons > MAX_SEMICOLONS:
            found.append(f"{name}: {one.semicolons:.0f} semicolons per 100 sentences")
        if one.long_share > MAX_LONG_SHARE:
            found.append(f"{name}: {one.long_share:.0%} of sentences over {LONG_WORDS} words")
        if one.lines > MAX_PAGE_LINES and name != "CHANGELOG.md":
            found.append(f"{name}: {one.lines} lines (at most {MAX_PAGE_LINES})")
    return found


def table(measured: dict[str, Measured]) -> str:
    """Return the figures of each page and package as a table."""
    rows = ["| where | sentences | over 35 words | semicolons per 100 | long functions | solid |"]
    rows.append("|---|---|---|---|---|---|")
    joined = groups(measured)
    joined["all"] = sum(joined.values(), Measured())
    for name, one in joined.items():
        rows.append(
            f"| {name} | {len(one.sentences)} | {one.long_share:.1%} | {one.semicolons:.0f} "
            f"| {one.long_functions} | {len(one.solid)} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print figures, not complaints")
    measured = files()
    if parser.parse_args().table:
        print(table(measured))
        return 0
    found = complaints(measured)
    print("\n".join(found) or "every page and every file is within the limits")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
