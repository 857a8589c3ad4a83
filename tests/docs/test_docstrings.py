"""The examples in the docstrings of all modules run; tests/test_package.py has those of the public names."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import flowback_hf
import flowback_hf_cli


PACKAGES = (flowback_hf, flowback_hf_cli)
MODULES = [
    module.name for package in PACKAGES for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def own_examples(name: str) -> list[doctest.DocTest]:
    """The module's examples, without those of names that the package exports."""
    module = importlib.import_module(name)
    objects = [(name, module)]
    for attribute, member in vars(module).items():
        if getattr(member, "__module__", None) != name or attribute in flowback_hf.__all__:
            continue
        objects.append((f"{name}.{attribute}", member))
        if inspect.isclass(member):
            objects += [(f"{name}.{attribute}.{key}", value) for key, value in vars(member).items()]
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


def test_some_modules_have_examples():
    assert sum(len(own_examples(name)) for name in MODULES) > 0
