"""The page as a Space: what is published, and that it runs where this package is not installed."""

import os
import subprocess
import sys

import pytest
import yaml

from flowback_hf import FlowBackPipeline
from flowback_hf.space import GRADIO_VERSION, PACKAGES, push_space, write_space

from ..conftest import REPOSITORY, command_line, load_script
from ..run_folders import write_tiny_run


@pytest.fixture
def run_dir(randomised_model, tmp_path):
    return write_tiny_run(tmp_path / "run", randomised_model().float())


def publish(run_dir, **options) -> None:
    script = load_script(REPOSITORY / "pipelines" / "push_to_hub.py")
    script.main(script.parse_args(command_line(model=run_dir, **options)))


def test_the_command_publishes_flow_and_page(the_hub, run_dir, capsys):
    publish(run_dir, hub_model_id="flow", space="page", hub_private_repo=True)
    assert capsys.readouterr().out.split() == [f"{the_hub.url}/tester/flow", f"{the_hub.url}/spaces/tester/page"]
    space = the_hub.repositories["spaces/tester/page"]
    assert space.private and sorted(space.files) == ["README.md", "app.py", "page.py", "requirements.txt"]
    assert space.files["page.py"] == (REPOSITORY / "src" / "flowback_hf" / "page.py").read_bytes()
    metadata = yaml.safe_load(space.files["README.md"].decode().split("---")[1])
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py" and metadata["models"] == ["tester/flow"]


def test_an_edited_card_stays_and_the_page_is_replaced(the_hub, run_dir):
    publish(run_dir, hub_model_id="flow", space="page")
    files = the_hub.repositories["spaces/tester/page"].files
    files["README.md"], files["page.py"] = b"edited", b"old"
    push_space("tester/page", "tester/flow")
    assert files["README.md"] == b"edited" and files["page.py"] != b"old"


def test_a_public_page_is_refused_where_a_private_one_is_asked_for(the_hub, run_dir):
    publish(run_dir, hub_model_id="flow", space="page")
    files = dict(the_hub.repositories["spaces/tester/page"].files)
    with pytest.raises(ValueError, match="'tester/page' exists and is public, but `private` is True"):
        push_space("page", "tester/flow", private=True)
    assert the_hub.repositories["spaces/tester/page"].files == files
    with pytest.raises(ValueError, match="'tester/page' exists and is public"):
        publish(run_dir, hub_model_id="other", space="page", hub_private_repo=True)
    assert "tester/other" not in the_hub.repositories
    push_space("secret", "tester/flow", private=True)
    push_space("secret", "tester/flow", private=True)
    assert the_hub.repositories["spaces/tester/secret"].private


def test_mistakes(the_hub, run_dir, tmp_path):
    with pytest.raises(ValueError, match="needs a flow on the Hub, but 'tester/nothing' is not one"):
        push_space("page", "tester/nothing")
    with pytest.raises(ValueError, match="`--output_dir` and `--create_pr` must be left out"):
        publish(run_dir, space="page", output_dir=tmp_path / "folder")
    assert not the_hub.repositories and not (tmp_path / "folder").exists()


def test_its_requirements_are_those_of_the_package(tmp_path):
    write_space(tmp_path, "tester/flow")
    setup = (REPOSITORY / "setup.py").read_text()
    requirements = (tmp_path / "requirements.txt").read_text().split()
    assert len(requirements) == len(PACKAGES) and all(f'"{each}"' in setup for each in requirements)
    assert f'"app": ["gradio>={GRADIO_VERSION.removesuffix(".0")}"]' in setup


RUN = """
import runpy, sys
sys.modules["flowback_hf"] = sys.modules["flowback_hf_cli"] = None  # as if they were not installed
sys.path.insert(0, ".")
page = runpy.run_path("app.py")["page"]
page.build()
*_, images = page.sample([0], 1.0, 0, 2, "auto")
upload = {"path": page.examples[0]}
assert len(images) == 2 and "nats" in page.classify(upload)[1]
assert "differs by at most" in page.invert(upload, "read")[-1]
assert len(page.vary(upload, 1, 0.5, 0)) == 8 and "sum to" in page.likelihood_map(upload, 1)[-1]
print("it runs")
"""


def test_it_runs_without_the_package(the_hub, run_dir, tmp_path):
    FlowBackPipeline.from_pretrained(run_dir).push_to_hub("flow")
    write_space(tmp_path / "space", "tester/flow")
    environment = {**os.environ, "HF_ENDPOINT": the_hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path / "space", env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "it runs"
