import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline, TarFlowReverseTransformer2DModel
from flowback_hf.hub import load_pipeline, write_repository
from flowback_hf.model_card import is_as_written

from .conftest import randomise_weights
from .run_folders import write_tiny_run
from .stand_in_hub import REVOKED_TOKEN, TOKEN


REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def run_dir(randomised_model, tmp_path):
    return write_tiny_run(tmp_path / "run", randomised_model(num_layers=2).float())


def files_of(the_hub, name="tester/flow"):
    return the_hub.repositories[name].files


def card_of(the_hub, name="tester/flow"):
    return files_of(the_hub, name)["README.md"].decode()


# A repository


REPOSITORY_FILES = [
    "README.md",
    "model_index.json",
    "modular_config.json",
    "modular_flowback.py",
    "modular_model_index.json",
    "pipeline_flowback.py",
    "pipeline_flowback_classification.py",
    "reverse_transformer/transformer_reverse.py",
    "samples/step-0000020.png",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/transformer_tarflow.py",
]


def test_what_belongs_goes_up_and_nothing_else(the_hub, run_dir):
    url = FlowBackPipeline.from_pretrained(run_dir).push_to_hub("flow")
    assert url == f"{the_hub.url}/tester/flow"
    assert sorted(files_of(the_hub)) == REPOSITORY_FILES
    assert not the_hub.repositories["tester/flow"].private
    assert the_hub.tokens - {""} == {TOKEN}
    for name, content in files_of(the_hub).items():
        assert TOKEN.encode() not in content and str(run_dir).encode() not in content, name
        assert b"/home/somebody" not in content, name
    assert (run_dir / "README.md").read_text() == card_of(the_hub)


def test_the_card_recommends_the_commit_of_the_code(the_hub, run_dir):
    FlowBackPipeline.from_pretrained(run_dir).push_to_hub("flow")
    code_and_weights, card_only = the_hub.repositories["tester/flow"].commits
    card = card_of(the_hub)
    assert card.count(f'revision="{code_and_weights}"') == 2 and card_only not in card
    assert "trust_remote_code=True" in card and "dtype=torch.float32" in card
    assert is_as_written(card) and (run_dir / "README.md").read_text() == card


LOAD = """
import sys, torch
torch.set_num_threads(1)
way, output, local_folder = sys.argv[1:]
if way == "without the package":
    sys.modules["flowback_hf"] = None  # as if it were not installed
    from diffusers import DiffusionPipeline
    load = lambda repo_id: DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)
else:
    from flowback_hf import FlowBackPipeline
    load = FlowBackPipeline.from_pretrained
images = {}
for repo_id in ("tester/pixels", "tester/latents"):
    pipe = load(repo_id)
    library = "diffusers_modules" if way == "without the package" else "flowback_hf"
    assert {type(part).__module__.split(".")[0] for part in (pipe, pipe.transformer)} == {library}
    generator = torch.Generator().manual_seed(5)
    images[repo_id] = pipe(class_labels=["felis", 3], generator=generator, output_type="pt").images
    assert pipe.guidance_scale == 1.5
    latents = pipe.invert(images[repo_id], ["felis", 3])
    options = {"guidance_scale": 1.0, "output_type": "latent"}
    restored = pipe(["felis", 3], latents=latents, denoise=False, **options).images
    edits = [pipe.swap_class(images[repo_id], [3, 0], [3, 0], **options).images]
    edits += [pipe.vary(images[repo_id], 0.0, [3, 0], **options).images]
    edits += [pipe.interpolate(*images[repo_id], 2, [3, 0], **options).images]
    for edited in (restored, *edits):
        torch.testing.assert_close(edited, pipe.encode(images[repo_id]), rtol=0, atol=1e-4)
    log_prob = pipe.transformer.log_prob(pipe.encode(images[repo_id]))
    torch.testing.assert_close(pipe.likelihood_map(images[repo_id]).sum(dim=(1, 2)), log_prob)
assert type(pipe.reverse_transformer).__module__.split(".")[0] == library and pipe.reverse_transformer.heads is None
pipe.reverse_transformer.load_heads(repo_id)
for denoise in (True, False):
    generator = torch.Generator().manual_seed(5)
    arguments = {"solver": "learned", "denoise": denoise, "generator": generator, "output_type": "pt"}
    images[denoise] = pipe(class_labels=["felis", 3], **arguments).images
torch.save(images, output)
if way == "without the package":
    try:
        pipe.push_to_hub("other")
    except ImportError as error:
        assert "needs the package flowback_hf" in str(error)
    else:
        raise AssertionError
    from diffusers import ModularPipeline
    for repo_id in ("tester/pixels", "tester/latents", local_folder):
        pipe = ModularPipeline.from_pretrained(repo_id, trust_remote_code=True)
        pipe.load_components()
        generator = torch.Generator().manual_seed(5)
        generated = pipe(class_labels=["felis", 3], generator=generator, output_type="pt", output="images")
        assert torch.equal(generated, images.get(repo_id, images["tester/latents"])), repo_id
        classes = pipe(images=generated, output="classes")
        log_prob = pipe(images=generated, class_labels=["felis", 3], output="log_prob")
        assert len(classes) == len(log_prob) == 2 and torch.isfinite(log_prob).all()
        if repo_id == "tester/pixels":
            continue
        arguments = {"solver": "learned", "generator": generator.manual_seed(5), "output_type": "pt"}
        assert torch.equal(pipe(class_labels=["felis", 3], output="images", **arguments), images[True]), repo_id
else:
    from flowback_hf import FlowBackClassificationPipeline
    from flowback_hf.hub import load_pipeline
    for repo_id in ("tester/pixels", "tester/latents"):
        pictures = images[repo_id]
        classifier = load_pipeline(FlowBackClassificationPipeline, repo_id)
        scores = classifier.class_scores(pictures, method="bayes")
        torch.save(scores, output.replace("with the package", repo_id.split("/")[1]))
    assert not any(name.startswith("diffusers_modules") for name in sys.modules)
"""


def test_they_load_with_and_without_the_package_and_sample_the_same_bits(
    the_hub, run_dir, randomised_model, tiny_vae, tmp_path
):
    FlowBackPipeline.from_pretrained(run_dir).push_to_hub("pixels")
    # diffusers' other way of publishing
    transformer = randomised_model(in_channels=4, position_embedding="rope", activation_fn="swiglu").float()
    reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(transformer, max_guidance_scale=2.0)
    reverse_transformer.add_heads()
    randomise_weights(reverse_transformer, seed=1)
    latent_pipeline = FlowBackPipeline(
        transformer, tiny_vae, {0: "cat, felis"}, guidance_scale=1.5, reverse_transformer=reverse_transformer
    )
    latent_pipeline.save_pretrained(tmp_path / "latents", push_to_hub=True, private=True)
    assert the_hub.repositories["tester/latents"].private
    assert not any(name.startswith("samples") for name in files_of(the_hub, "tester/latents"))
    assert not (tmp_path / "latents" / "README.md").exists()
    write_repository(latent_pipeline, tmp_path / "repository", "elsewhere/latents")

    processes = {}
    for way in ("with the package", "without the package"):
        environment = {"HF_ENDPOINT": the_hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **environment, "HF_HOME": str(tmp_path / way)}
        command = [sys.executable, "-c", LOAD, way, str(tmp_path / f"{way}.pt"), str(tmp_path / "repository")]
        processes[way] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for process in processes.values():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "were not found in your environment" not in errors  # diffusers' warning of missing packages

    for repo_id, folder in {"tester/pixels": run_dir, "tester/latents": tmp_path / "latents"}.items():
        pipeline = FlowBackPipeline.from_pretrained(folder)
        generator = torch.Generator().manual_seed(5)
        expected = pipeline(class_labels=["felis", 3], generator=generator, output_type="pt").images
        assert expected.std() > 0.01
        for way in processes:
            assert torch.equal(torch.load(tmp_path / f"{way}.pt")[repo_id], expected), (repo_id, way)
        for denoise in (True, False) if pipeline.reverse_transformer is not None else ():
            pipeline.reverse_transformer.load_heads(folder)
            arguments = {"solver": "learned", "denoise": denoise, "generator": generator.manual_seed(5)}
            learned = pipeline(class_labels=["felis", 3], output_type="pt", **arguments).images
            assert learned.std() > 0.01 and not torch.equal(learned, expected)
            for way in processes:
                assert torch.equal(torch.load(tmp_path / f"{way}.pt")[denoise], learned), (denoise, way)
        # a classifier is loaded from the same repository
        scores = FlowBackClassificationPipeline.from_pipe(pipeline).class_scores(expected, method="bayes")
        assert scores.std() > 0
        assert torch.equal(torch.load(tmp_path / f"{repo_id.split('/')[1]}.pt"), scores)


def test_a_newer_upload_leaves_no_shards_and_pictures_of_the_older(the_hub, run_dir):
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    pipeline.push_to_hub("flow")
    files_of(the_hub)["transformer/diffusion_pytorch_model-00001-of-00002.safetensors"] = b"old"
    files_of(the_hub)["notes.txt"] = b"a person's"
    (run_dir / "samples/step-0000020.png").rename(run_dir / "samples/step-0000040.png")
    pipeline.push_to_hub("flow")
    expected = [name.replace("0020", "0040") for name in [*REPOSITORY_FILES, "notes.txt"]]
    assert sorted(files_of(the_hub)) == sorted(expected)


# Cards


def test_a_card_edited_in_the_runs_folder_goes_up_and_is_kept(the_hub, run_dir, caplog):
    logger = logging.get_logger("flowback_hf.hub")
    logger.addHandler(caplog.handler)
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    pipeline.push_to_hub("flow")
    edited = card_of(the_hub).replace("## Use", "## Use it well")
    (run_dir / "README.md").write_text(edited)
    pipeline.push_to_hub("flow")
    assert card_of(the_hub) == edited
    # Now the one on the Hub is a person's: neither a fresh card nor another edit replaces it.
    (run_dir / "README.md").unlink()
    pipeline.push_to_hub("flow")
    assert card_of(the_hub) == edited
    logger.removeHandler(caplog.handler)
    assert "The card of tester/flow was edited by hand on the Hub and is kept" in caplog.text


def test_a_card_that_nobody_edited_is_written_again(the_hub, run_dir):
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    pipeline.push_to_hub("flow")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "validation_nll": -0.5}) + "\n")
    pipeline.push_to_hub("flow")
    assert "-0.5000 (step 30)" in card_of(the_hub) and is_as_written(card_of(the_hub))
    assert (run_dir / "README.md").read_text() == card_of(the_hub)


# The scripts


@pytest.fixture(scope="module")
def push_script():
    path = REPOSITORY / "pipelines" / "push_to_hub.py"
    spec = importlib.util.spec_from_file_location("push_to_hub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_publishes_a_finished_run(the_hub, run_dir):
    environment = {**os.environ, "HF_ENDPOINT": the_hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN")
    command = [sys.executable, str(REPOSITORY / "pipelines" / "push_to_hub.py"), "--model", str(run_dir)]
    command += ["--hub_model_id", "group/flow", "--hub_token", TOKEN, "--hub_private_repo", "--license", "cc0-1.0"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith(f"{the_hub.url}/group/flow") and TOKEN not in run.stdout + run.stderr
    assert the_hub.repositories["group/flow"].private and "license: cc0-1.0" in card_of(the_hub, "group/flow")
    assert sorted(files_of(the_hub, "group/flow")) == REPOSITORY_FILES


def test_the_command_writes_a_repository_to_look_at(push_script, the_hub, run_dir, tmp_path):
    line = ["--model", str(run_dir), "--hub_model_id", "me/flow", "--output_dir", str(tmp_path / "look")]
    push_script.main(push_script.parse_args(line))
    files = sorted(
        str(path.relative_to(tmp_path / "look")) for path in (tmp_path / "look").rglob("*") if path.is_file()
    )
    assert files == REPOSITORY_FILES and not the_hub.requests
    with pytest.raises(ValueError, match="`--output_dir` must be a new folder, but .*look exists"):
        push_script.main(push_script.parse_args(line))
    with pytest.raises(ValueError, match="`--model` must be the folder of a saved pipeline, but .*samples has no"):
        push_script.main(push_script.parse_args(["--model", str(run_dir / "samples")]))
    pipeline = FlowBackPipeline.from_pretrained(tmp_path / "look")
    assert type(pipeline.transformer).__module__ == "flowback_hf.models.transformer_tarflow"


# Loading


@pytest.mark.parametrize("pipeline_class", [FlowBackPipeline, FlowBackClassificationPipeline])
def test_a_pipeline_is_loaded_from_a_folder(run_dir, pipeline_class):
    for model in (run_dir, str(run_dir)):
        pipeline = load_pipeline(pipeline_class, model)
        assert type(pipeline) is pipeline_class and pipeline.config.guidance_scale == 1.5


@pytest.mark.parametrize("model", ["nowhere", "tester/nothing"])
def test_a_model_that_is_nowhere_is_named(the_hub, model):
    message = f"but '{model}' is neither: there is no folder .*{model}, and no such pipeline was found on the Hub"
    with pytest.raises(ValueError, match=f"`--model` must be a folder .* {message}"):
        load_pipeline(FlowBackPipeline, model)


@pytest.mark.parametrize("name", ["no/such/folder", "../flow", Path("no", "such", "folder")])
def test_a_path_that_is_nowhere_is_not_looked_for_on_the_hub(the_hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = Path(name).resolve()
    with pytest.raises(ValueError, match=f"'{name}' is neither: there is no folder {where}, and an id has the form"):
        load_pipeline(FlowBackPipeline, name)
    assert not the_hub.requests


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    message = f"`--pretrained_model_name_or_path` must be a folder .* there is no model_index.json in {tmp_path}"
    with pytest.raises(ValueError, match=message):
        load_pipeline(FlowBackPipeline, tmp_path, "--pretrained_model_name_or_path")


# Bad input


def test_no_token_is_refused(the_hub, run_dir, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="There is no token to push with: run `hf auth login`"):
        FlowBackPipeline.from_pretrained(run_dir).push_to_hub("flow")
    assert not the_hub.requests


def test_a_token_that_the_hub_does_not_take_is_said(the_hub, run_dir):
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    with pytest.raises(
        ValueError, match="`repo_id` 'flow' on the Hub cannot be written to: Invalid user token"
    ) as error:
        pipeline.push_to_hub("flow", token=REVOKED_TOKEN)
    assert REVOKED_TOKEN not in str(error.value) and not the_hub.repositories


def test_a_repository_of_another_model_is_refused_without_force(the_hub, run_dir, randomised_model):
    FlowBackPipeline.from_pretrained(run_dir).push_to_hub("flow")
    before = dict(files_of(the_hub))
    other = FlowBackPipeline(randomised_model(num_blocks=2, num_classes=7).float())
    match = r"`repo_id` 'tester/flow' exists and holds a model .* differs in num_blocks, num_classes, num_layers"
    with pytest.raises(ValueError, match=match):
        other.push_to_hub("flow")
    assert files_of(the_hub) == before
    other.push_to_hub("flow", force=True)
    assert json.loads(files_of(the_hub)["transformer/config.json"])["num_blocks"] == 2


def test_saving_publishes_with_its_license_and_no_variant(the_hub, run_dir, tmp_path):
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    with pytest.raises(ValueError, match="`variant` must be left out with `push_to_hub`, .* but is 'fp16'"):
        pipeline.save_pretrained(tmp_path / "flow", push_to_hub=True, variant="fp16")
    assert not the_hub.repositories and not (tmp_path / "flow").exists()
    pipeline.save_pretrained(tmp_path / "flow", push_to_hub=True, license="cc-by-4.0")
    assert "license: cc-by-4.0" in files_of(the_hub)["README.md"].decode()


def test_the_same_flow_is_published_again(the_hub, run_dir, randomised_model):
    """With a profile of its inverse, which says nothing of the model, and with a tuple, which JSON does not know."""
    flow = randomised_model(num_layers=(1, 2, 1)).float()
    FlowBackPipeline(flow).push_to_hub("flow")
    flow.profile_inverse(torch.randn(1, 3, 4, 4))
    FlowBackPipeline(flow).push_to_hub("flow")
    assert json.loads(files_of(the_hub)["transformer/config.json"])["inverse_profile"] is not None


def test_a_repository_of_something_else_is_refused(the_hub, run_dir):
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    pipeline.push_to_hub("flow")
    files_of(the_hub).clear()
    files_of(the_hub)["config.json"] = b"{}"
    with pytest.raises(ValueError, match="exists and holds a model of another configuration"):
        pipeline.push_to_hub("flow")


def test_a_public_repository_is_refused_where_a_private_one_is_asked_for(the_hub, run_dir):
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    pipeline.push_to_hub("flow")
    with pytest.raises(ValueError, match="'tester/flow' exists and is public, but `private` is True"):
        pipeline.push_to_hub("flow", private=True)
    pipeline.push_to_hub("secret", private=True)
    pipeline.push_to_hub("secret", private=True)
    assert the_hub.repositories["tester/secret"].private


def test_a_folder_that_is_no_run_is_refused(run_dir, the_hub, tmp_path):
    with pytest.raises(
        ValueError, match="`run_dir` must be an output folder of training/train_rra.py, but '.*nowhere'"
    ):
        FlowBackPipeline.from_pretrained(run_dir).push_to_hub("flow", run_dir=tmp_path / "nowhere")
