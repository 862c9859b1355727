"""Checks: a line each, JSON that every reader takes, the exit code."""

import json
import math
from pathlib import Path

import pytest

from latentvae.errors import UserError
from latentvae.proofs.checks import Check, check_json_file, conclude


def check(name: str, *, passed: bool, value: object = 0.5) -> Check:
    return Check(name=name, passed=passed, value=value, expected="above 0", advice="mend it")


def test_the_advice_is_told_where_a_check_failed() -> None:
    assert str(check("a", passed=True)) == "ok     a: 0.5 (expected: above 0)"
    assert str(check("a", passed=False)) == "FAILED a: 0.5 (expected: above 0). mend it"
    assert "\n" not in str(check("a", passed=True, value="x\ny"))


def test_lines_fit_eighty_columns_and_lose_no_word() -> None:
    words = ", ".join(f"--option_{i} value" for i in range(20))
    text = str(check("a", passed=False, value=words))
    lines = text.splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 80
    assert all(line.startswith(" " * 7) for line in lines[1:])
    assert " ".join(text.split()) == f"FAILED a: {words} (expected: above 0). mend it"
    path = "/" + "x" * 100
    assert path in str(check("a", passed=True, value=path))


def test_exit_code_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checks.json"
    checks = [check("a", passed=True), check("b", passed=False, value=[math.nan, 1.0])]
    assert conclude(checks[:1]) == 0 and conclude(checks, json_file=file) == 1
    assert capsys.readouterr().out.splitlines() == [
        "1 of 1 checks hold",
        "1 of 2 checks hold. b failed",
    ]

    def refuse(name: str) -> None:
        raise AssertionError(name)

    first, second = json.loads(file.read_text(), parse_constant=refuse)["checks"]
    assert set(first) == {"name", "passed", "value", "expected", "advice"}
    assert (first["passed"], second["passed"], second["value"]) == (True, False, ["nan", 1.0])


def test_where_no_report_can_be_written(tmp_path: Path) -> None:
    check_json_file(None)
    check_json_file(tmp_path / "checks.json")
    for path in (tmp_path, tmp_path / "none" / "checks.json"):
        with pytest.raises(UserError, match="json"):
            check_json_file(path)
