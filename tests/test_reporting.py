import subprocess
import sys

import PIL.Image

from flowback_hf.reporting import (
    current_commit,
    describe_machine,
    import_pyplot,
    markdown_table,
    save_figure,
    shade_blocks,
)

from .conftest import REPOSITORY


def test_a_table_has_a_row_for_each_row():
    assert markdown_table(["a", "b"], [["x", 1], ["y", 2.5]]) == "| a | b |\n| --- | --- |\n| x | 1 |\n| y | 2.5 |"


def test_a_figure_is_written_whole(tmp_path):
    figure, axis = import_pyplot().subplots()
    shade_blocks(axis, [1, 1, 2, 2, 2], [0, 1, 2, 3, 4])
    numbers = axis.child_axes[0]
    assert [label.get_text() for label in numbers.get_xticklabels()] == ["block 1", "block 2"]
    assert numbers.get_xticks().tolist() == [0.5, 3.0]
    (shade,) = axis.patches
    assert (shade.get_x(), shade.get_width()) == (1.5, 3.0)
    save_figure(figure, tmp_path / "figure.png")
    assert PIL.Image.open(tmp_path / "figure.png").format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


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
