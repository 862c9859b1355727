"""Write names that users chose as plain text into Markdown and CSV files."""

import re

from latentvae.errors import printable


def markdown_text(text: str) -> str:
    """Return Markdown that shows a name as plain text, not as table cells, code, links or HTML."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", printable(text))


def spreadsheet_text(name: str) -> str:
    """Return a name as a cell of a CSV file that no spreadsheet runs as a formula.

    Spreadsheets run text that starts with ``=``, ``+``, ``-`` or ``@``
    (https://owasp.org/www-community/attacks/CSV_Injection).
    """
    text = printable(name)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
