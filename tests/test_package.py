import ast
import doctest
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import flowback_hf


REPOSITORY = Path(__file__).parents[1]
PUBLIC = [getattr(flowback_hf, name) for name in flowback_hf.__all__]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_docstring_examples_run(public):
    # the closing fence of an example would be read as its expected output
    docstring = inspect.getdoc(public).replace("```py", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(docstring, {}, public.__name__, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
    assert example.examples or public.__name__.endswith("Output")


def documented_functions():
    """Every public function with arguments, and the docstring that holds them: the class's for a constructor."""
    for public in PUBLIC:
        for name, function in inspect.getmembers(public, inspect.isroutine):
            own = (getattr(function, "__module__", None) or "").startswith("flowback_hf")
            docstring = public.__doc__ if name == "__init__" else function.__doc__
            if own and "Args:" in (docstring or ""):
                yield pytest.param(function, docstring, id=function.__qualname__)


@pytest.mark.parametrize("function, docstring", list(documented_functions()))
def test_docstrings_name_every_argument(function, docstring):
    for name in inspect.signature(function).parameters.keys() - {"self"}:
        assert re.search(rf"^ +([^:]*, )?`?{name}`?(, \w+)*( \(|:)", docstring, re.MULTILINE), name


def documented_defaults():
    for function, docstring in (parameter.values for parameter in documented_functions()):
        parameters = inspect.signature(function).parameters
        for names, default in re.findall(r"^ +((?:\w+, )*\w+) \([^)]*defaults to `?([^`)]+)`?\)", docstring, re.M):
            for name in names.split(", "):
                yield pytest.param(parameters, name, default, id=f"{function.__qualname__}-{name}")


@pytest.mark.parametrize("parameters, name, default", list(documented_defaults()))
def test_documented_defaults_are_the_signatures(parameters, name, default):
    if default == "the pipeline's":
        assert parameters[name].default is None
    else:
        assert parameters[name].default == ast.literal_eval(default)


def test_some_defaults_are_documented():
    assert len(list(documented_defaults())) > 10


def test_the_model_and_the_pipeline_need_torch_and_diffusers_only():
    """Each is uploaded as a single file for those who load a model without the package."""
    files = ("models/transformer_tarflow.py", "models/transformer_reverse.py", "pipelines/pipeline_flowback.py")
    for file in files:
        tree = ast.parse((REPOSITORY / "src" / "flowback_hf" / file).read_text())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level or node.module.split(".")[0])
        # diffusers requires Pillow and safetensors itself.
        assert imported - sys.stdlib_module_names - {"PIL", "safetensors"} == {"torch", "diffusers"}


USE = """
import sys, torch
import flowback_hf.conversion, flowback_hf.hub
from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
assert flowback_hf.__file__.startswith(sys.prefix), flowback_hf.__file__
flow = TarFlowTransformer2DModel(8, 4, num_blocks=2, num_layers=1, num_attention_heads=1, attention_head_dim=8,
                                 num_classes=3)
FlowBackPipeline(flow, id2label={0: "a", 1: "b", 2: "c"}).save_pretrained("saved")
assert flowback_hf.conversion.labels_of_known_data(1000)[1].startswith("goldfish")  # both are files of the package
assert "## Citation" in flowback_hf.hub.render_model_card(FlowBackPipeline.from_pretrained("saved"), "name")
image = FlowBackPipeline.from_pretrained("saved")(class_labels=["b"]).images[0]
image.save("sample.png")
print(image.size)
"""


def test_a_wheel_works_in_a_fresh_environment_from_another_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # of a copy: building leaves folders behind
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("flowback_hf-*.whl")

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site_packages = next(environment.rglob("site-packages"))
    # The dependencies are those of this environment: installing them anew would take minutes and the network. The
    # checkout itself is not among them, since a .pth file's folders are searched for no other .pth files.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    use = subprocess.run([python, "-c", USE], cwd=elsewhere, env=variables, capture_output=True, text=True)
    assert use.returncode == 0, use.stderr
    assert use.stdout.strip() == "(8, 8)" and (elsewhere / "sample.png").exists()
