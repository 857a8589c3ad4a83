"""The examples in the docstrings of all modules run; tests/test_package.py has those of the exported classes."""

import doctest
import importlib
import inspect
import pkgutil
import types

import pytest

import flowback_hf
import flowback_hf_cli


METHODS = (types.FunctionType, classmethod, staticmethod, property)
PACKAGES = (flowback_hf, flowback_hf_cli)
MODULES = [
    module.name for package in PACKAGES for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def own_examples(name: str) -> list[doctest.DocTest]:
    """The module's examples, without those of the classes that the package exports, but with their methods'."""
    module = importlib.import_module(name)
    objects = [(name, module)]
    for attribute, member in vars(module).items():
        if getattr(member, "__module__", None) != name:
            continue
        if attribute not in flowback_hf.__all__:
            objects.append((f"{name}.{attribute}", member))
        if inspect.isclass(member):
            members = {key: value for key, value in vars(member).items() if isinstance(value, METHODS)}
            objects += [(f"{name}.{attribute}.{key}", value) for key, value in members.items()]
    parser = doctest.DocTestParser()
    examples = []
    for title, member in objects:
        docstring = getattr(member, "__doc__", None)
        if isinstance(docstring, str) and ">>>" in docstring:
            # the closing fence of an example would be read as its expected output
            text = inspect.cleandoc(docstring).replace("```py", "").replace("```", "")
            examples.append(parser.get_doctest(text, {}, title, None, None))
    return examples


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in own_examples(name):
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        runner.run(example)
        assert runner.summarize(verbose=False).failed == 0, example.name


def test_functions_and_methods_have_examples():
    names = [example.name for name in MODULES for example in own_examples(name)]
    assert len(names) > 40
    assert {"swap_class", "interpolate", "vary", "log_prob"} <= {name.rpartition(".")[2] for name in names}
