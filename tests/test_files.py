import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowback_hf.files import compare_settings, read_json, read_json_lines, write_json, write_text, write_whole


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "picture.png"
    with write_whole(path) as partial:
        partial.write_text("half")
        assert not path.exists() and partial.suffix == ".png" and partial.parent == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"] and path.read_text() == "half"


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    for path in (tmp_path / "text", tmp_path / "folder"):
        is_folder = path.name == "folder"
        if is_folder:
            path.mkdir()
            (path / "old").touch()
        else:
            write_text(path, "old")
        with pytest.raises(RuntimeError), write_whole(path) as partial:
            if is_folder:
                partial.mkdir()
            else:
                partial.write_text("new")
            raise RuntimeError
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "text"]
    assert (tmp_path / "text").read_text() == "old" and (tmp_path / "folder" / "old").exists()


def test_a_folder_replaces_a_folder_and_what_a_killed_process_left(tmp_path):
    path = tmp_path / "folder"
    (path / "old").mkdir(parents=True)
    (tmp_path / ".partial-folder" / "half").mkdir(parents=True)
    with write_whole(path) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_json(tmp_path):
    write_json(tmp_path / "x.json", {"σ": [1, None]})
    assert read_json(tmp_path / "x.json") == {"σ": [1, None]}
    (tmp_path / "notes.txt").write_text("{")
    with pytest.raises(ValueError, match="notes.txt is not a JSON file: Expecting"):
        read_json(tmp_path / "notes.txt")
    assert read_json(tmp_path / "nowhere.json") is None and read_json_lines(tmp_path / "nowhere.jsonl") == []


@given(
    records=st.lists(st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text()), max_size=4),
    cut=st.integers(min_value=1, max_value=40),
)
def test_half_a_line_is_left_out_wherever_it_is_cut(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    last = json.dumps({"step": 10, "nested": {"loss": 0.25}, "text": "}"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + last[: min(cut, len(last) - 1)])
    assert read_json_lines(path) == records


def test_settings_differ_in_either_direction():
    earlier, now = {"a": 1, "gone": 2, "seed": 0}, {"a": 1, "new": 3, "seed": 1}
    expected = ["new (None then, 3 now)", "seed (0 then, 1 now)", "gone (2 then, None now)"]
    assert compare_settings(earlier, now) == expected
    assert compare_settings(earlier, now, may_differ={"new", "gone", "seed"}) == []
    assert compare_settings({}, {"absent": None}) == []
