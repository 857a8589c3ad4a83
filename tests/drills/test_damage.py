"""Single bits that flip in the files of a run. Each one is noticed, or does no harm."""

import functools
import random
import shutil
import signal
from pathlib import Path

import pytest

from flowback_hf.training import list_checkpoints

from .runs import assert_same_run, send_at_line, start


def files_of(folder: Path) -> list[str]:
    """The files that a resumed run reads, and its log."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(folder)) for path in files)
    return [name for name in names if name.startswith("checkpoint-") or name.endswith((".json", ".jsonl"))]


def flip_a_bit(path: Path, rng: random.Random) -> int:
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


@pytest.fixture(scope="module")
def unfinished_run(tiny_line, tmp_path_factory):
    """A run that was killed after its second checkpoint, and what becomes of it undisturbed."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    before = functools.partial(send_at_line, folder, 8, "SIGKILL")
    process = start(folder.with_suffix(".log"), tiny_line(folder, max_train_steps=6), before)
    assert process.wait() == -signal.SIGKILL, process.log
    assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    finished = folder.with_name("finished")
    shutil.copytree(folder, finished)
    process = start(folder.with_suffix(".log"), tiny_line(finished, max_train_steps=6))
    assert process.wait() == 0, process.log
    return folder, finished


SHORT = [(0, name) for name in ("checkpoint-4/ema.safetensors", "training_args.json")]


@pytest.mark.parametrize(
    "seed, name", [*SHORT, *(pytest.param(seed, None, marks=pytest.mark.drill) for seed in range(12))]
)
def test_bits_flip(unfinished_run, line, tmp_path, drill, seed, name):
    """Every file once for each seed: resumed, the run says so or ends as it would have."""
    unfinished, finished = unfinished_run
    names = files_of(unfinished) if name is None else [name]
    counts = dict.fromkeys(("flips", "noticed", "harmless", "silent"), 0)
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(unfinished, folder)
        bit = flip_a_bit(folder / name, random.Random(f"{seed} {name}"))
        process = start(tmp_path / "log", line(folder, max_train_steps=6))
        assert process.wait() in (0, 2) and "Traceback" not in process.log, f"bit {bit} of {name}: {process.log}"
        assert process.wait() == 0, f"bit {bit} of {name}: {process.log}"
        assert_same_run(folder, finished)
        noticed = Path(name).parent.name in process.log and "not used" in process.log or "damaged" in process.log
        counts["flips"] += 1
        counts["noticed" if noticed else "harmless"] += 1
        shutil.rmtree(folder)
    drill("Bits that flip", **counts)


DAMAGE = {
    "progress.json is a list": ("checkpoint-4/progress.json", b"[]"),
    "progress.json is null": ("checkpoint-4/progress.json", b"null"),
    "progress.json lacks a key": ("checkpoint-4/progress.json", b'{"global_step": 4}'),
    "metrics.jsonl has foreign bytes": ("metrics.jsonl", b"\xff\xfe\x00\n"),
    "metrics.jsonl lacks steps": ("metrics.jsonl", b'{"loss": 1.0}\n'),
    "training_args.json is empty": ("training_args.json", b""),
    "training_args.json is a list": ("training_args.json", b"[]"),
}


@pytest.mark.parametrize(
    "damage", [*list(DAMAGE)[:1], *(pytest.param(key, marks=pytest.mark.drill) for key in list(DAMAGE)[1:])]
)
def test_damaged_records(unfinished_run, line, tmp_path, drill, damage):
    unfinished, finished = unfinished_run
    name, content = DAMAGE[damage]
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    (folder / name).write_bytes(content)
    process = start(tmp_path / "log", line(folder, max_train_steps=6))
    assert process.wait() == 0, process.log
    assert_same_run(folder, finished)
    drill("Damaged records", files=1, runs_lost=0)


def test_all_checkpoints_damaged(unfinished_run, line, tmp_path, drill):
    folder = tmp_path / "run"
    shutil.copytree(unfinished_run[0], folder)
    for checkpoint in folder.glob("checkpoint-*"):
        flip_a_bit(checkpoint / "model.safetensors", random.Random(0))
    before = contents_of(folder)
    process = start(tmp_path / "log", line(folder, max_train_steps=6))
    assert process.wait() == 2, process.log
    assert "finds no checkpoint that is whole" in process.sentence and "delete these folders" in process.sentence
    assert contents_of(folder) == before
    drill("Damaged records", files=2, runs_lost=0)


def contents_of(folder: Path) -> dict[Path, bytes]:
    """All files but the lock, which the killed process left."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {path: path.read_bytes() for path in files}
