"""What the prose lint counts. `make check` runs it over the project itself."""

from tests.style.plain_words import complaints, measure_page, measure_source

LONG = "One " + "word " * 40 + "ends."


def test_a_page_counts_paragraphs_without_code_and_tables() -> None:
    table = "| a; | b |\n|---|---|\n| c; | d |"
    page = f"# Title\n\nFirst; one. Second.\n\n    a; b; c\n\n{table}\n\n- {LONG}\n"
    measured = measure_page(page)
    assert [sentence.words for sentence in measured.sentences] == [1, 2, 1, 42]
    assert measured.semicolons == 25 and measured.long_share == 0.25
    assert measured.sentences[-1].line == 11


def test_a_source_counts_docstrings_comments_and_messages() -> None:
    source = (
        'def f(x):\n    """Return x; or not.\n\n    Args:\n        x: a number.\n        y: b; c.\n'
        '    """\n    # Why; because.\n'
        '    raise ValueError(f"x must be at least 1; got {x} here")\n'
        '    key = "short"\n'
    )
    texts = {sentence.text for sentence in measure_source(source).sentences}
    assert "Return x; or not." in texts and "x: a number." in texts and "Why; because." in texts
    assert "x must be at least 1; got `code` here" in texts and "short" not in texts
    assert len(texts) == 6  # and "Args:", "y: b; c."


def test_a_long_function_needs_a_blank_line_after_its_docstring() -> None:
    body = "".join(f"    a{i} = {i}\n" for i in range(30))
    solid = f'def f():\n    """Do it.\n\n    Twice.\n    """\n{body}'
    airy = solid.replace("    a9", "\n    a9")
    short = 'def f():\n    """Do it."""\n    return 1\n'
    assert measure_source(solid).solid == [(1, "f")]
    assert measure_source(airy).solid == [] and measure_source(airy).long_functions == 1
    assert measure_source(short).long_functions == 0


def test_complaints_name_the_file_and_the_line() -> None:
    found = complaints({"docs/page.md": measure_page(f"Fine.\n\n{LONG}\n")})
    assert found[0].startswith("docs/page.md:3: 42 words: One word")
    assert any("of sentences over 35 words" in line for line in found)
    assert complaints({"latentvae/x.py": measure_source("x = 1\n")}) == []
