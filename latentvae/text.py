"""Escape names that users chose, so that Markdown and CSV files show plain text."""

import re

from latentvae.errors import printable


def markdown_text(text: str) -> str:
    """Return Markdown that shows a name as plain text, not as table cells, code, links or HTML."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", printable(text))


def spreadsheet_text(name: str) -> str:
    """Return a name as a CSV cell, in a form that no spreadsheet runs as a formula.

    Spreadsheets run text that starts with ``=``, ``+``, ``-`` or ``@``
    (https://owasp.org/www-community/attacks/CSV_Injection).
    """
    text = printable(name)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
