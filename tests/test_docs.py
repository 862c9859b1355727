"""What the documentation names is there."""

import ast
import re
from pathlib import Path

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
    assert len(rows) == 11 + 12 + 12 + 12
    for row in rows:
        answer = row.strip("| ").split(" | ")[-1]
        assert re.search(r"::test_|[Nn]ot offered yet|Cannot occur: |Caught before", answer), row


def test_files_that_the_table_names_exist() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    for path in re.findall(r"`((?:latentvae|\.ci)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
