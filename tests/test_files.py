import contextlib
import errno
import functools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowback_hf import files
from flowback_hf.files import (
    compare_settings,
    explain_full_disk,
    move_into,
    read_json,
    read_json_lines,
    read_metrics_log,
    write_json,
    write_text,
    write_whole,
)


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


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    disk = tmp_path / "disk"
    (disk / "folder" / "old").mkdir(parents=True)
    (disk / "text").write_text("old")
    for name in ("folder", "text"):
        (tmp_path / name).symlink_to(disk / name)
    with write_whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "new").touch()
    write_text(tmp_path / "text", "new")
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "text").is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["folder", "text"]
    assert [path.name for path in (disk / "folder").iterdir()] == ["new"] and (disk / "text").read_text() == "new"


def test_what_a_killed_process_left_may_be_of_the_other_kind(tmp_path):
    (tmp_path / ".partial-folder").write_text("half")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".replaced-folder").mkdir()
    with write_whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "new").touch()
    (tmp_path / ".partial-text" / "half").mkdir(parents=True)
    write_text(tmp_path / "text", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "text"]
    assert (tmp_path / "folder" / "new").exists()


def test_a_folder_that_is_replaced_is_never_seen_half(tmp_path, monkeypatch):
    seen, replace, rmtree = [], os.replace, files.shutil.rmtree

    def look():
        seen.append(sorted(path.name for path in tmp_path.glob("folder/*")))

    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), look()))
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: (look(), rmtree(path)))
    for names in (["a", "b"], ["c", "d"]):
        with write_whole(tmp_path / "folder") as partial:
            partial.mkdir()
            for name in names:
                (partial / name).touch()
    assert seen == [["a", "b"], [], ["c", "d"], ["c", "d"]]


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Or a power cut leaves empty files under their final names."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    with write_whole(tmp_path / "folder") as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_text("whole")
    names = [event.replace(str(tmp_path), "").replace(".partial-", "") for event in events]
    assert names == ["/folder/inner/file", "/folder/inner", "/folder", "rename", ""]


def test_an_index_never_stands_beside_what_it_does_not_describe(tmp_path, monkeypatch):
    """Wherever moving a pipeline over an older one is interrupted."""
    is_complete = True
    for interrupted_at in range(1, 12):  # there are ten operations
        folder, staging = tmp_path / f"old-{interrupted_at}", tmp_path / f"new-{interrupted_at}"
        for path, content in ((folder, "old"), (staging, "new")):
            for name in ("index.json", "a/weights", "z/weights"):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_text(content)
        operations = iter(range(1, 99))

        def interrupt(*paths, do, operations=operations, interrupted_at=interrupted_at):
            if next(operations) == interrupted_at:
                raise KeyboardInterrupt
            return do(*paths)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for module, name in ((files, "remove"), (os, "replace"), (files.shutil, "rmtree")):
                patch.setattr(module, name, functools.partial(interrupt, do=getattr(module, name)))
            move_into(staging, folder, "index.json")
        is_complete = (folder / "index.json").exists()
        if is_complete:
            names = ("index.json", "a/weights", "z/weights")
            contents = {(folder / name).read_text() for name in names if (folder / name).exists()}
            assert len(contents) == 1 and all((folder / name).exists() for name in names)
    assert is_complete and contents == {"new"}, "the last one was not interrupted"


def test_an_error_that_is_not_a_full_disk_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="^unexpected pos 75008 vs 74896$"), explain_full_disk(tmp_path / "file"):
        raise RuntimeError("unexpected pos 75008 vs 74896")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="There is no room for .*file: the disk is full"):
        with explain_full_disk(tmp_path / "file"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")


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


def test_damaged_lines_are_left_out(tmp_path):
    lines = [b'{"step": 1}', b"\xff\xfe", b'{"loss": 1.0}', b"[]", b'{"step": "one"}', b"null", b'{"step": 2, "x": 1}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_metrics_log(tmp_path) == [{"step": 1}, {"step": 2, "x": 1}]


def test_settings_differ_in_either_direction():
    earlier, now = {"a": 1, "gone": 2, "seed": 0}, {"a": 1, "new": 3, "seed": 1}
    expected = ["new (None then, 3 now)", "seed (0 then, 1 now)", "gone (2 then, None now)"]
    assert compare_settings(earlier, now) == expected
    assert compare_settings(earlier, now, may_differ={"new", "gone", "seed"}) == []
    assert compare_settings({}, {"absent": None}) == []
