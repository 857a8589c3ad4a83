"""Folders that cannot be written to."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .runs import assert_one_sentence, assert_same_run, start


@contextlib.contextmanager
def mounted_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A disk of this size, in memory. Skips the test without the right to mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Bytes on a disk with pages of 4096."""
    return sum(-(-file.stat().st_size // 4096) * 4096 + 4096 for file in folder.rglob("*"))


@pytest.mark.parametrize(
    "share", [0.6, *(pytest.param(i / 20, marks=pytest.mark.drill) for i in range(1, 17) if i != 12)]
)
def test_a_full_disk(whole_run, line, tmp_path, drill, share):
    """It ends with one sentence, and goes on when there is room."""
    with mounted_disk(tmp_path / "disk", int(share * size_of(whole_run.folder))) as disk:
        folder = disk / "run"
        process = start(tmp_path / "log", line(folder))
        assert_one_sentence(process, r"There is no room for .*: the disk is full, or your quota is used up. What was")
        kept = tmp_path / "run"
        shutil.copytree(folder, kept)
        drill("Full disks", runs=1, sentences=1, lost_runs=0)
    process = start(tmp_path / "log", line(kept))
    assert process.wait() == 0, process.log
    assert_same_run(kept, whole_run.folder)


def test_a_device_that_is_always_full(whole_run, line, tmp_path, drill):
    """A picture goes to a device that takes nothing. This needs no root."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".partial-loss_curve.png").symlink_to("/dev/full")
    process = start(tmp_path / "log", line(folder))
    assert_one_sentence(process, r"There is no room for .*loss_curve.png: the disk is full")
    process = start(tmp_path / "log", line(folder))
    assert process.wait() == 0, process.log
    assert_same_run(folder, whole_run.folder)
    drill("Full disks", runs=1, sentences=1, lost_runs=0)


@pytest.mark.parametrize("has_run", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_a_read_only_folder(whole_run, line, tmp_path, drill, has_run):
    with mounted_disk(tmp_path / "disk", 1 << 24) as disk:
        if has_run:
            shutil.copytree(whole_run.folder, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        process = start(tmp_path / "log", line(disk / "run", max_train_steps=5))
        assert_one_sentence(process, r"Read-only file system: '.*run")
    drill("Read-only folders", runs=1, sentences=1)
