"""The house: who may import whom."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
SOURCES = REPOSITORY / "src"
SCRIPTS = sorted(path for folder in ("training", "pipelines") for path in (REPOSITORY / folder).glob("*.py"))
MODULES = sorted((SOURCES / "flowback_hf").rglob("*.py")) + sorted((SOURCES / "flowback_hf_cli").rglob("*.py"))

# From the bottom. A module imports what is on its own floor or below; those of one line know each other.
FLOORS = [
    ["flowback_hf_cli"],
    ["files", "places", "reporting"],
    ["models"],
    ["pipelines", "alignment", "metrics", "conversion"],
    ["data"],
    ["model_card", "hub", "page", "space"],
    ["training", "evaluation"],
    ["ablation"],
]
# The package itself, which its public names are imported from: the floor of the highest that it imports.
PACKAGE_FLOOR = 3


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    package, _, rest = module.partition(".")
    if package == "flowback_hf_cli":
        return 0
    if not rest:
        return PACKAGE_FLOOR
    part = rest.split(".")[0]
    return next(number for number, floor in enumerate(FLOORS) if part in floor)


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, inside functions too."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from package import module` imports the module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if (SOURCES / f"{name.replace('.', '/')}.py").exists()}
            imported |= modules or {node.module}
    return imported


def own_imports(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] in ("flowback_hf", "flowback_hf_cli")}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_nothing_above_it(path):
    module = module_name(path)
    above = {imported for imported in own_imports(path) if floor_of(imported) > floor_of(module)}
    assert not above


def test_a_floor_above_is_noticed():
    assert floor_of("flowback_hf.training.trainer") > floor_of("flowback_hf.data.splits") > floor_of("flowback_hf")
    assert len(MODULES) > 40 and len(SCRIPTS) >= 12
    trainer = own_imports(SOURCES / "flowback_hf" / "training" / "trainer.py")
    assert {"flowback_hf", "flowback_hf.data", "flowback_hf.training.checkpoints"} <= trainer


def test_no_circles():
    graph = {module_name(path): own_imports(path) for path in MODULES}
    # `from flowback_hf import X` is the package's __init__, which imports the lower floors only.
    done, under_way = set(), []

    def visit(module: str):
        if module in done or module not in graph:
            return
        assert module not in under_way, f"circle: {' -> '.join([*under_way, module])}"
        under_way.append(module)
        for imported in sorted(graph[module]):
            visit(imported)
        under_way.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_the_one_import_by_name_is_the_pipelines_of_the_hub():
    """Publishing needs the package, and loading a pipeline must not."""
    by_name = {}
    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            if ast.unparse(call.func).endswith("import_module") and isinstance(call.args[0], ast.Constant):
                by_name.setdefault(module_name(path), []).append(call.args[0].value)
    assert by_name == {"flowback_hf.pipelines.pipeline_flowback": ["flowback_hf.hub"]}


def test_the_light_package_imports_the_standard_library_only():
    for path in (SOURCES / "flowback_hf_cli").glob("*.py"):
        outside = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names
        assert outside <= {"flowback_hf_cli"}, path


def test_what_is_copied_stays_a_copy():
    """Files that are uploaded with a model cannot import it, so they hold copies, marked as diffusers marks them."""
    copies = 0
    for path in MODULES:
        for name, copy in re.findall(r"^# Copied from ([\w.]+)\n(.*?)(?=\n\n\n)", path.read_text(), re.S | re.M):
            module, _, function = name.rpartition(".")
            original = (SOURCES / f"{module.replace('.', '/')}.py").read_text()
            assert f"\n{copy}\n\n\n" in original and copy.startswith(f"def {function}("), f"{path}: {name}"
            copies += 1
    assert copies == 7


def test_nothing_imports_a_script_or_changes_the_path():
    scripts = {path.stem for path in SCRIPTS}
    for path in [*MODULES, *SCRIPTS, *(REPOSITORY / "benchmarks").glob("*.py"), REPOSITORY / "setup.py"]:
        imported = {name.split(".")[0] for name in imports_of(path)}
        assert not imported & scripts, f"{path} imports a script"
        attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        touches_path = [node.lineno for node in attributes if ast.unparse(node) == "sys.path"]
        assert not touches_path, f"{path} changes sys.path in line {touches_path}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_and_wrong_flags_are_answered_before_anything_slow_is_imported(path):
    """`-S` leaves out installed packages: only the standard library and the flags can be imported."""
    command = [sys.executable, "-S", "-c"]
    code = f"import sys, runpy; sys.path.insert(0, {str(SOURCES)!r}); sys.argv = [{path.name!r}, sys.argv[1]]"
    code += f"; runpy.run_path({str(path)!r}, run_name='__main__')"
    answer = subprocess.run([*command, code, "--help"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert f"usage: {path.name}" in answer.stdout
    answer = subprocess.run([*command, code, "--no_such_flag"], capture_output=True, text=True)
    assert answer.returncode == 2 and "error: " in answer.stderr and "Traceback" not in answer.stderr


def test_ruff_checks_the_whole_repository():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["ruff"]
    assert "exclude" not in settings and "per-file-ignores" not in settings["lint"]
