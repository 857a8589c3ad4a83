import importlib
import shutil
import sys
from pathlib import Path

import pytest

from .pages import PAGES, REPOSITORY


@pytest.fixture(scope="module")
def tables():
    """`benchmarks/tables.py` as a module; it finds the other scripts as they find each other."""
    folder = str(REPOSITORY / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path.remove(folder)


@pytest.fixture
def copy(tables, tmp_path, monkeypatch) -> Path:
    """A copy of the pages, which the script takes for the repository's."""
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copytree(REPOSITORY / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    return tmp_path


def test_pages_hold_what_was_measured(tables, capsys):
    assert tables.main(tables.parse_args(["--check"])) == 0, capsys.readouterr().out


def test_every_table_stands_on_a_page(tables):
    text = "".join(page.read_text() for page in PAGES)
    for name in tables.TABLES:
        assert f"<!-- table: {name} -->\n" in text, name


def test_a_figure_changed_by_hand_is_found_and_repaired(tables, copy, capsys):
    tables.main(tables.parse_args([]))
    page = copy / "docs" / "alignment.md"
    text = page.read_text()
    page.write_text(text.replace("| `forward` | 4.67 s |", "| `forward` | 4.12 s |"))
    assert page.read_text() != text

    capsys.readouterr()
    assert tables.main(tables.parse_args(["--check"])) == 1
    assert "docs/alignment.md: alignment-cost differs" in capsys.readouterr().out
    assert page.read_text() != text
    assert tables.main(tables.parse_args([])) == 0
    assert page.read_text() == text


def test_an_unknown_table_is_refused(tables):
    with pytest.raises(ValueError, match="names a table 'speed', but there are only"):
        tables.render(Path("docs/page.md"), "<!-- table: speed -->\n<!-- end table -->\n")
