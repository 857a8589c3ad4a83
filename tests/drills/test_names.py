"""Hostile names of classes and files: shown as they are, never run, in cards, pages, tables, pictures and messages."""

import csv
import html
import itertools
import json
import os
import re

import numpy as np
import PIL.Image
import pytest
from markdown_it import MarkdownIt

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.model_card import render_model_card
from flowback_hf.reporting import markdown_code, markdown_table, markdown_text, spreadsheet_text

from ..conftest import REPOSITORY, command_line, load_script


NAMES = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[click](https://evil.example)",
    "https://evil.example", "www.evil.example", "mail@evil.example", "# heading", "```", "`code`",
    "*bold* _it_ ~~no~~", "a|b", "\\", "$x^$", "$", "{{ 7 * 7 }}", "{% raw %}", "![x](https://evil.example/x.png)",
    "&lt;b&gt;", "one\ntwo", "one\n\n# two", "---", "- x", "\x1b[31mred", "\u202eright", "a\u2028b", "=1+1",
    "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "%s %n", "'", "\"", "'''", "--help", "name:7", "id:7", "None",
    "é 猫 🐈",
]  # fmt: skip
PARTS = [
    "<", ">", "b", "[", "]", "(", ")", "`", "```", "|", "\\", "#", "*", "_", "~~", "\n", " ", "://", "www.", "&", ";",
]  # fmt: skip
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def shown(page: str) -> str:
    """What a reader of a page sees: HTML without its tags."""
    return html.unescape(re.sub("<[^>]*>", "", page))


def plain(name: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in name).split())


@pytest.fixture(scope="module")
def flow():
    options = {"num_blocks": 1, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 4}
    return TarFlowTransformer2DModel(4, 2, **options, num_classes=2)


def assert_is_text(name: str):
    """In a paragraph, in a cell, and in a cell as code."""
    if not plain(name):
        return
    table = markdown_table(["name"], [[markdown_text(name)], [markdown_code(name)]])
    for page in (f"Classes: {markdown_text(name)}.", table):
        rendered = MARKDOWN.render(page)
        tags = set(re.findall(r"</?(\w+)", rendered))
        assert tags <= {"p", "table", "thead", "tbody", "tr", "th", "td", "code"}, (name, rendered)
        count = 1 if page.startswith("Classes") else 2
        assert shown(rendered).count(plain(name)) == count, (name, rendered)


def test_names_are_text_in_markdown():
    for name in NAMES:
        assert_is_text(name)


@pytest.mark.parametrize("length", [pytest.param(2, id="short"), pytest.param(3, id="long", marks=pytest.mark.drill)])
def test_all_short_texts_of_special_parts_are_text(length, drill):
    for parts in itertools.product(PARTS, repeat=length):
        assert_is_text("x" + "".join(parts) + "x")
    drill("Hostile names in a card", names=len(PARTS) ** length, that_are_not_text=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_the_shape_of_a_harmless_one(flow, name):
    def tags_of(names: list[str]) -> list[str]:
        card = render_model_card(FlowBackPipeline(flow, id2label=dict(enumerate(names))), "somebody/flow")
        return re.findall(r"</?\w+", MARKDOWN.render(card.partition("\n---\n")[2].partition("<!--")[0]))

    assert tags_of([name, "dog"]) == tags_of(["cat", "dog"])


def test_spreadsheets_run_nothing():
    for name in [*NAMES, "\t=1", "\r=1", "\udcff", "plain"]:
        text = spreadsheet_text(name)
        assert text[0] not in "=+-@\t\r"
        text.encode()
    assert spreadsheet_text("plain") == "plain"


FILE_NAMES = [name for name in NAMES if "/" not in name] + [os.fsdecode(b"\xff")]


def test_files_of_any_name_are_classified(flow, tmp_path, monkeypatch, capsys):
    """The table names files that can be opened, and labels that a spreadsheet does not run."""
    classify = load_script(REPOSITORY / "pipelines" / "classify.py")
    FlowBackPipeline(flow, id2label={0: "=1+1", 1: "-x"}).save_pretrained(tmp_path / "flow")
    (tmp_path / "images").mkdir()
    for name in FILE_NAMES:
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.png")
    monkeypatch.chdir(tmp_path / "images")
    files = [f"{name}.png" for name in FILE_NAMES if not name.startswith("-")]
    line = ["--model", "../flow", "--batch_size", "64", "--images", *files, ".", "--output", "../table.csv"]
    classify.main(classify.parse_args(line))
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert len(rows) == len(files) + len(FILE_NAMES)
    for path, *cells in rows:
        assert path[0] not in "=+-@\t\r" and (os.path.isfile(path) or "\\udcff" in path)
        assert {cells[0], cells[2]} == {"'=1+1", "'-x"}
    classify.main(classify.parse_args([*line[:-2]]))  # on the screen
    assert capsys.readouterr().out.startswith("file,label_1,score_1")


def test_classes_of_any_name_are_trained_and_sampled(teacher, tmp_path):
    """From folders to the saved pipeline, its pictures and its card."""
    train_rra = load_script(REPOSITORY / "training" / "train_rra.py")
    sample = load_script(REPOSITORY / "pipelines" / "sample.py")
    # `datasets` finds no labels if a folder has a backslash in its name, and the script says what to do.
    names = [name for name in FILE_NAMES if "\udcff" not in name and "\\" not in name]
    for number, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        for copy in range(2):
            pixels = np.full((4, 4, 3), 5 * number + copy, np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "images" / name / f"{copy}.png")
    line = command_line(
        train_data_dir=tmp_path / "images", output_dir=tmp_path / "run", cache_dir=tmp_path / "cache",
        alignment="none", resolution=4, patch_size=2, num_blocks=1, num_layers=1, num_attention_heads=1,
        attention_head_dim=4, train_batch_size=8, max_train_steps=1, train_val_split=0.2,
    )  # fmt: skip
    train_rra.main(train_rra.parse_args(line))
    pipe = FlowBackPipeline.from_pretrained(tmp_path / "run")
    assert sorted(pipe.config.id2label.values()) == sorted(names)
    options = {"model": tmp_path / "run", "output_dir": tmp_path / "samples", "num_images": 10}
    sample.main(sample.parse_args([*command_line(**options), "--class_labels", *map(str, range(len(names)))]))
    assert (tmp_path / "samples" / "grid.png").exists()
    settings = json.loads((tmp_path / "samples" / "sampling.json").read_text())
    assert settings["class_labels"] == list(range(len(names)))
    for label in names:
        if label in ("-1", "+1", "id:7"):  # numbers and prefixes have a meaning of their own
            continue
        assert pipe.config.id2label[pipe.get_label_ids(label)[0]] == label
    assert "# run" in render_model_card(pipe, "somebody/run", tmp_path / "run")
