"""
Drills: what users meet when something goes wrong, many times over. A short form of each runs with the tests; the long
forms are marked `drill`, run with `make drills`, and write their counts into docs/drills.md.
"""

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowback_hf.files import write_text
from flowback_hf.reporting import current_commit, describe_machine, markdown_table

from ..conftest import command_line
from .runs import start


REPORT = Path(__file__).parents[2] / "docs" / "drills.md"
ABOUT = """# Drills

<!-- test: only parsed, needs half an hour -->
```bash
make drills
```

What happens to a run, a model and a command when things go wrong: processes are killed, disks fill up, files are
damaged. The command does all of this again and writes this page. A short form of each drill runs with `make test`.

"""


@pytest.fixture
def drill(record_property):
    """
    Count what a drill did: `drill("Kills at random moments", kills=10, lost=0)`.

    Counts of the same drill are summed over all tests, into one row of the report.
    """

    def count(name: str, **counts: int):
        record_property("drill", json.dumps([name, counts]))

    return count


class Reporter:
    """Collects the counts of all tests, which may run in other processes, and writes the report."""

    def __init__(self):
        self.counts: dict[str, Counter] = {}
        self.failed = 0
        self.started = time.monotonic()

    def pytest_runtest_logreport(self, report):
        self.failed += report.failed
        if report.when == "call":
            for name, value in report.user_properties:
                if name == "drill":
                    drill_name, counts = json.loads(value)
                    self.counts.setdefault(drill_name, Counter()).update(counts)

    def pytest_sessionfinish(self):
        if self.counts:
            write_text(REPORT, ABOUT + self.render())

    def render(self) -> str:
        rows = [
            [name, ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())]
            for name, counts in sorted(self.counts.items())
        ]
        machine = ", ".join(f"{name} {value}" for name, value in describe_machine("cpu").items())
        minutes = (time.monotonic() - self.started) / 60
        about = f"`make drills`, commit {current_commit()}, {minutes:.0f} minutes; {machine}."
        return f"{markdown_table(['drill', 'counts'], rows)}\n\n{about} Failed tests: {self.failed}.\n"


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    if not is_worker and config.option.markexpr == "drill":
        config.pluginmanager.register(Reporter(), "drill_report")


@dataclass(frozen=True)
class WholeRun:
    """A run that nothing happened to: its folder, and the seconds that it took."""

    folder: Path
    seconds: float


@pytest.fixture(scope="session")
def tiny_line(images, teacher, tmp_path_factory):
    """The command line of a run of four steps, three validations and two checkpoints, as a function of its folder."""
    cache = tmp_path_factory.mktemp("cache")

    def line(folder: Path, **options) -> list[str]:
        tiny = {
            "train_data_dir": images, "teacher_model_name_or_path": teacher, "cache_dir": cache, "resolution": 8,
            "patch_size": 2, "num_blocks": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4,
            "projector_dim": 8, "train_batch_size": 4, "max_train_steps": 4, "lr_warmup_steps": 1,
            "learning_rate": 1e-2, "logging_steps": 1, "validation_steps": 2, "checkpointing_steps": 2,
            "output_dir": folder, "resume_from_checkpoint": "latest",
        }  # fmt: skip
        return command_line(**(tiny | options))

    return line


@pytest.fixture
def line(tiny_line):
    return tiny_line


@pytest.fixture(scope="session")
def whole_run(tiny_line, tmp_path_factory) -> WholeRun:
    """The second of two: the first one also fills caches."""
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp("whole") / name
        started = time.monotonic()
        process = start(folder.with_suffix(".log"), tiny_line(folder))
        assert process.wait() == 0, process.log
        seconds = time.monotonic() - started
    return WholeRun(folder, seconds)
