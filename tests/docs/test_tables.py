import importlib
import json
import shutil
import sys
from collections.abc import Iterator
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
def copy(tables, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of the pages and of what they are written from, which the script takes for the repository's."""
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copytree(REPOSITORY / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copytree(REPOSITORY / "training" / "ablations", tmp_path / "training" / "ablations")
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    tables.read.cache_clear()
    yield tmp_path
    tables.read.cache_clear()


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


def test_the_records_of_an_ablation_become_a_table(tables, copy):
    """Rows are means over seeds, and cells that ran by the same command share a line of sources."""
    records = copy / "benchmarks" / "results" / "ablation_glyphs"
    shutil.rmtree(records, ignore_errors=True)
    page = Path("docs/ablation.md")
    assert tables.TABLES["ablation-glyphs"]().markdown(page) == "Nothing has been measured yet."

    machine = {"cpu": "Test CPU", "cores": 2, "threads": 1, "torch": "2.0"}
    fast, slow = "reverse-0-late", "reverse-0-late-600-images"
    cells = [("none", 0, 0.5, 400), ("none", 1, 0.5, 400), (fast, 0, 0.7, 100), (fast, 3, 0.9, 100)]
    cells += [("none-600-images", 0, 0.2, 300), (slow, 0, 0.3, 200)]
    for variant, seed, accuracy, step in cells:
        curve = {"step": [0, step, 400 + step], "accuracy": [0.0, 0.5, 0.5], "nll": [1.0] * 3, "distance": [1.0] * 3}
        row = {"variant": variant, "seed": seed, "status": "done", "curve": curve, "checkpoint_curve": curve}
        row["seconds"] = {"train": 1800.0, "evaluate": 360.0}
        row["metrics"] = {"accuracy_gradient": accuracy + seed / 10}
        (records / variant).mkdir(parents=True, exist_ok=True)
        command = f"python training/ablate.py --jobs 2 --variants {variant} other --seeds {seed} --threads 1"
        content = {"command": command, "commit": f"abc{seed}", "machine": machine, "row": row}
        (records / variant / f"seed-{seed}.json").write_text(json.dumps(content))
    table = tables.TABLES["ablation-glyphs"]()
    rows = {cells[0]: dict(zip(table.header, cells)) for cells in table.rows}
    assert list(rows) == ["`none`", "`reverse-0-late`"]
    assert rows["`none`"]["seeds"] == "2" and rows["`none`"]["accuracy, one gradient, %"] == "55.0 ± 5.0"
    assert rows["`reverse-0-late`"]["× fewer steps, accuracy"] == "4.00"
    assert "× less time, accuracy" not in table.header
    assert table.markdown(page).count("\n- ") == 1
    source = "1.8 hours, with 1 thread, torch 2.0: `python training/ablate.py --jobs 2 --threads 1`, a part at a time"
    folder = "../benchmarks/results/ablation_glyphs"
    records_of = f"[none]({folder}/none), seed 0 at abc0, seed 1 at abc1; [{fast}]({folder}/{fast}), seed 0 at abc0"
    assert f"- {source} (`--variants`, `--seeds`): {records_of}\n" in table.markdown(page)

    # each is compared with its own baseline, in steps and in the time of a step, as all were measured in turn
    times = {"none-600-images": {"median_seconds": 0.1}, slow: {"median_seconds": 0.2}}
    content = {"command": "ablate --time_steps", "commit": "abc", "machine": machine, "results": times}
    (records / "step_seconds-glyphs_why.json").write_text(json.dumps(content))
    table = tables.TABLES["ablation-glyphs-why"]()
    rows = {cells[0]: dict(zip(table.header, cells)) for cells in table.rows}
    assert list(rows) == ["`none`", "`reverse-0-late`", "`none-600-images`", f"`{slow}`"]
    assert rows[f"`{slow}`"]["baseline"] == "`none-600-images`"
    assert rows[f"`{slow}`"]["× fewer steps, accuracy"] == "1.50"
    assert rows[f"`{slow}`"]["× less time, accuracy"] == "0.75"
    assert "--time_steps" in table.markdown(page)

    # fresh seeds stand alone
    table = tables.TABLES["ablation-glyphs-confirmation"]()
    assert [row[0] for row in table.rows] == ["`reverse-0-late`"] and "120.0" in table.rows[0]

    # the longer baseline reaches the accuracy of `none`, which ends after 800 steps, after 1200, and no other nll
    assert tables.TABLES["ablation-glyphs-further"]().rows == []
    curve = {"step": [0, 800, 1600], "accuracy": [0.0, 0.4, 0.6], "nll": [2.0] * 3, "distance": [2.0, 1.5, 0.5]}
    row |= {"variant": "none-long", "seed": 0, "checkpoint_curve": curve}
    (records / "none-long").mkdir()
    content = {"command": command, "commit": "abc", "machine": machine, "row": row}
    (records / "none-long" / "seed-0.json").write_text(json.dumps(content))
    tables.read.cache_clear()
    rows = tables.TABLES["ablation-glyphs-further"]().rows
    assert rows == [
        ["`none`", "2", "1.50", "not reached", "1.50"],
        ["`reverse-0-late`", "1", "2.40", "not reached", "2.40"],
    ]


def test_an_unknown_table_is_refused(tables):
    with pytest.raises(ValueError, match="names a table 'speed', but there are only"):
        tables.render(Path("docs/page.md"), "<!-- table: speed -->\n<!-- end table -->\n")
