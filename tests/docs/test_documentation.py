"""Every command and every example of the documentation does what a reader would do with it, on tiny settings."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from .conftest import parse_script_options, run_script
from .pages import LINK, PAGES, REPOSITORY, Block, read_blocks, read_commands, split_command


pytestmark = pytest.mark.usefixtures("settings_of_torch")

PAGE_IDS = [page.relative_to(REPOSITORY).as_posix() for page in PAGES]
PAGES_WITH_CODE = [page for page in PAGES if read_blocks(page)]


def heading_anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_and_images_exist(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in heading_anchors(linked), f"{linked.name} has no heading for {target}"


def test_the_readme_is_short_and_installs_before_it_imports():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert text.index("pip install") < text.index("```python")


def test_every_page_is_in_the_maps():
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"}
    for index in (REPOSITORY / "README.md", REPOSITORY / "docs" / "README.md"):
        assert pages == {Path(target).name for target in LINK.findall(index.read_text())} & pages


def test_each_page_begins_with_code():
    for page in PAGES:
        if page.name != "README.md":
            assert read_blocks(page)[0].line < 12, page.name


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_blocks_run(page, clone):
    """In order, in one folder; Python blocks share their names."""
    names = {"__name__": page.stem}
    for block in read_blocks(page):
        print(f"\n== {block.where}")
        if block.language == "python":
            run_python(block, names)
        elif block.language == "bash":
            run_shell(block)
        else:
            assert block.language == "text", f"{block.where} is neither python, bash nor text"


def run_python(block: Block, names: dict):
    # empty lines first, so that an error names the line of the page
    tree = ast.parse("\n" * (block.line - 1) + block.code, filename=str(block.page))
    if not block.is_only_parsed():
        exec(compile(tree, str(block.page), "exec"), names)


def run_shell(block: Block):
    for command in read_commands(block):
        script_and_options = split_command(command)
        if script_and_options is None:
            check_other_command(block, command)
            continue
        script, options = script_and_options
        options += block.extra_options(script)
        assert Path(script).exists(), f"{block.where}: there is no {script}"
        if block.is_only_parsed(script):
            parse_script_options(script, options)
        else:
            run_script(script, options)


def check_other_command(block: Block, command: list[str]):
    """Commands of other programs that a page may show: their targets, extras and files exist."""
    if command[0] == "make":
        targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(command[1:]) <= set(targets), f"{block.where}: {command[1:]} are no targets"
    elif command[0] == "benchmarks/gpu.sh" and block.is_only_parsed():
        subprocess.run([*command, "--list"], check=True, stdout=subprocess.DEVNULL)
    elif command[:2] in (["pip", "install"], ["pip", "download"]) and block.is_only_parsed():
        setup = (REPOSITORY / "setup.py").read_text()
        extras = re.findall(r"^\.\[(.+)\]$", command[-1])
        assert all(f'"{extra}": [' in setup for extra in ",".join(extras).split(",") if extra), block.where
    elif command[:3] == ["python", "-m", "pytest"] and block.is_only_parsed():
        assert all((REPOSITORY / word).exists() for word in command[3:] if not word.startswith("-")), block.where
    else:
        pytest.fail(f"{block.where}: {' '.join(command)} is neither run nor marked")
