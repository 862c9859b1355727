"""Names that are not ours as plain text in the files that others read."""

import re

from latentvae.errors import printable


def markdown_text(text: str) -> str:
    """A name as plain text in Markdown: no table cell, code, link or HTML begins in it."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", printable(text))


def spreadsheet_text(name: str) -> str:
    """A name as a cell of a CSV file, where spreadsheets would run what begins with ``=``, ``+``,
    ``-`` or ``@`` (https://owasp.org/www-community/attacks/CSV_Injection)."""
    text = printable(name)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
