"""What the documentation names is there."""

import ast
import re
from pathlib import Path

from tests.proofs.mutations import MUTATIONS

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    assert len(named) > 30
    for path, name in sorted(named):
        tree = ast.parse((ROOT / path).read_text())
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (path, name)


def test_every_fault_has_a_test_or_a_reason() -> None:
    """A row's last cell names a test, or says that and why it cannot be."""
    rows = [
        line
        for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
        if re.match(r"\| \d+", line)
    ]
    assert len(rows) == 11 + 12 + 12 + 16 + 7 + 8
    for row in rows:
        answer = row.strip("| ").split(" | ")[-1]
        assert re.search(r"::test_|[Nn]ot offered yet|Cannot occur: |Caught before", answer), row


def test_files_that_the_table_names_exist() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    for path in re.findall(r"`((?:latentvae|\.ci)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_checks_that_rows_name_are_those_that_find_the_faults() -> None:
    rows = [
        row
        for row in (ROOT / "docs" / "faults.md").read_text().splitlines()
        if re.match(r"\| \d+\w? ", row)
    ]
    tables = zip(("A", "V", "T"), (11, 12, 12), strict=True)  # the third counts 8a to 8e
    keys = [f"{letter}{i}" for letter, n in tables for i in range(1, n + 1)]
    named: dict[str, set[str]] = {}
    for key, row in zip(keys, rows, strict=False):
        last = key if key[0] != "T" else f"T{min(int(key[1:]), 8)}"
        found = re.findall(r"`([\w-]+)`", row.partition("**preflight**")[2])
        named.setdefault(last, set()).update(found)
    for mutation in MUTATIONS:
        if mutation.fault:
            assert mutation.fails[0] in named[mutation.fault], mutation.name
    checks = {name for mutation in MUTATIONS for name in mutation.fails}
    assert {name for found in named.values() for name in found} <= checks
    page = (ROOT / "docs" / "preflight.md").read_text()
    assert all(f"`{name}`" in page for name in checks)
