"""Read the pages of the documentation: blocks of code, and the comments that say how a test treats them."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ONLY_PARSED = re.compile(r"only parsed, needs (.+)")


@dataclass
class Block:
    """
    A fenced block.

    Args:
        page (`Path`): The page it stands on.
        line (`int`): The number of the block's first line of code.
        language (`str`): What the fence names.
        code (`str`): The lines between the fences.
        marks (`list[str]`): What the comments before it say after `test:`.
    """

    page: Path
    line: int
    language: str
    code: str
    marks: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    def marks_of(self, script: str | None) -> list[str]:
        """The marks of one script, without its name, and those of all."""
        marks = []
        for mark in self.marks:
            first, _, rest = mark.partition(" ")
            if not first.endswith(".py"):
                marks.append(mark)
            elif script is not None and Path(script).name == first:
                marks.append(rest)
        return marks

    def is_only_parsed(self, script: str | None = None) -> bool:
        return any(ONLY_PARSED.fullmatch(mark) for mark in self.marks_of(script))

    def extra_options(self, script: str) -> list[str]:
        """Options that replace those of the block: argparse takes the last."""
        marks = self.marks_of(script)
        return [word for mark in marks if not ONLY_PARSED.fullmatch(mark) for word in shlex.split(mark)]


def read_blocks(page: Path) -> list[Block]:
    blocks, marks, block = [], [], None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        comment = re.fullmatch(r"<!-- test: (.+) -->", line)
        if block is not None:
            if line == "```":
                blocks.append(block)
                block = None
            else:
                block.code += f"{line}\n"
        elif comment:
            marks.append(comment[1])
        elif line.startswith("```"):
            block = Block(page, number + 1, line.removeprefix("```"), "", marks)
            marks = []
        else:
            assert not (marks and line), f"{page.name}:{number}: a comment `test:` must stand right before its block."
    assert block is None and not marks, f"{page.name} ends in an open block or a comment without its block."
    return blocks


def read_commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, its continued lines joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command for command in commands if command]


def split_command(command: list[str]) -> tuple[str, list[str]] | None:
    """The script of this repository that a command runs and its options; `None` if it runs none."""
    if command[0] == "sbatch":  # the SLURM script passes on what stands behind it
        position = command.index("training/configs/slurm/train.sh")
        return "training/train_rra.py", command[position + 1 :]
    if command[0] == "timeout":
        command = command[2:]
    if command[0] == "accelerate" and command[1] == "launch" or command[0] == "python":
        for position, word in enumerate(command):
            if word.endswith(".py"):
                return word, command[position + 1 :]
    return None
