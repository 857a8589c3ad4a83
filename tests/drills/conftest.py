"""
Drills: what users meet when something goes wrong, many times over. A short form of each runs with the tests; the long
forms are marked `drill`, run with `make drills`, and write their counts into docs/drills.md.
"""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from flowback_hf.files import write_text
from flowback_hf.reporting import current_commit, describe_machine, markdown_table


REPORT = Path(__file__).parents[2] / "docs" / "drills.md"
ABOUT = """# Drills

What happens to a run, a model and a command when things go wrong: processes are killed, disks fill up, files are
damaged. `make drills` does all of this again and writes this page. A short form of each drill runs with `make test`.

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
