import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import PIL.Image
import pytest

from flowback_hf.reporting import (
    current_commit,
    describe_machine,
    figure_file,
    markdown_table,
    shade_blocks,
)

from .conftest import REPOSITORY


def test_a_table_has_a_row_for_each_row():
    assert markdown_table(["a", "b"], [["x", 1], ["y", 2.5]]) == "| a | b |\n| --- | --- |\n| x | 1 |\n| y | 2.5 |"


def test_a_figure_is_written_whole(tmp_path):
    with figure_file(tmp_path / "figure.png") as (figure, [[axis]]):
        shade_blocks(axis, [1, 1, 2, 2, 2], [0, 1, 2, 3, 4])
    numbers = axis.child_axes[0]
    assert [label.get_text() for label in numbers.get_xticklabels()] == ["block 1", "block 2"]
    assert numbers.get_xticks().tolist() == [0.5, 3.0]
    (shade,) = axis.patches
    assert (shade.get_x(), shade.get_width()) == (1.5, 3.0)
    assert PIL.Image.open(tmp_path / "figure.png").format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_figures_leave_the_callers_matplotlib_as_it_is(tmp_path):
    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    with figure_file(tmp_path / "figure.png", 1, 2) as (_, [axes]):
        assert axes[0].set_title("$5").get_parse_math() is False
    assert dict(matplotlib.rcParams) == settings and matplotlib.get_backend(auto_select=False) == backend
    assert plt.get_fignums() == []


def test_a_figure_that_failed_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), figure_file(tmp_path / "figure.png"):
        raise KeyError("values")
    assert not list(tmp_path.iterdir()) and "text.parse_math" in matplotlib.rcParams
    assert matplotlib.rcParams["text.parse_math"] is True


def test_the_machine_and_the_commit_are_named():
    machine = describe_machine("cpu")
    assert machine["cores"] >= machine["threads"] >= 1 and machine["python"] == sys.version.split()[0]
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always"]
    git = subprocess.run(describe, capture_output=True, text=True)
    if git.returncode == 0:
        assert current_commit().removesuffix("-dirty") == git.stdout.strip()


def test_an_installed_copy_in_somebody_elses_repository_has_no_commit(tmp_path):
    package = tmp_path / "site-packages" / "flowback_hf"
    package.mkdir(parents=True)
    for name in ("reporting.py", "files.py"):
        (package / name).write_text((REPOSITORY / "src" / "flowback_hf" / name).read_text())
    (package / "__init__.py").touch()
    (tmp_path / "theirs.txt").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "--quiet"], ["add", "theirs.txt"], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    code = "from flowback_hf.reporting import current_commit; print(current_commit())"
    answer = subprocess.run([sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True)
    assert answer.stdout.strip() == "None", answer.stderr
