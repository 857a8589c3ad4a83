import json

import huggingface_hub
import pytest

from flowback_hf import FlowBackPipeline
from flowback_hf.model_card import (
    Run,
    example_call,
    find_run,
    is_as_written,
    read_edited_card,
    render_model_card,
    sign,
)

from .run_folders import ARGUMENTS, METRICS, PUBLISHED_RUNS, REPOSITORY, write_published_run, write_tiny_run


@pytest.fixture
def run_dir(randomised_model, tmp_path):
    return write_tiny_run(tmp_path / "run", randomised_model(num_layers=2).float())


def test_the_card_says_what_the_runs_files_say(run_dir):
    evaluation = {"accuracy": {"gradient": 0.875}, "command": "python evaluate_flow.py --model /home/x/a/b"}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    card = render_model_card(pipeline, "somebody/flow", run_dir, license="cc-by-4.0")
    data = huggingface_hub.ModelCard(card).data
    assert (
        data.library_name == "diffusers" and data.license == "cc-by-4.0" and data.base_model == "facebook/dinov2-base"
    )
    assert {"normalizing-flow", "tarflow", "r-repa"} <= set(data.tags)
    for line in (
        "# flow",
        'pipe = FlowBackPipeline.from_pretrained("somebody/flow")',
        "add `revision=` with the commit that you have read",
        "    dtype=torch.float32,",
        'pipe(class_labels=["cat"], ',
        "By default, `guidance_scale` is 1.5 with the linear rule.",
        "![Samples](samples/step-0000020.png)",
        "Drawn by the training script at step 20, seed 3, one row per class, `guidance_scale=1.5`.",
        "`guidance_scale=1.5`. The samples were not",
        "| transformer layers per block | 2 |",
        "Classes: cat, felis, dog.",
        "| data | `pets/images` |",
        "| alignment | reverse, order 0, weight 0.1 |",
        "| aligned places | block 1 layer 2, block 3 layer 1 |",
        "| batch size | 4 per process, 2 accumulated |",
        "learning rate 0.001, cosine after 5 steps of warm-up",
        "| validation nll, nats per dimension | -0.1250 (step 20) |",
        "| validation nll at step 0 | 1.2500 |",
        "| cosine similarity, block 3 layer 1 | 0.7500 |",
        "| accuracy / gradient | 0.875 |",
        "| command | python evaluate_flow.py --model a/b |",
        "Gaussian noise (σ = 0.05)",
        "arXiv preprint arXiv:2511.22345",
    ):
        assert line in card, line
    for placeholder in ("None", "TODO", "More information needed", "{{", "/home/"):
        assert placeholder not in card


def test_the_card_says_how_the_learning_rate_and_the_gradients_are_scaled(run_dir):
    pipeline = FlowBackPipeline.from_pretrained(run_dir)
    assert "gradients clipped to " in render_model_card(pipeline, "somebody/flow", run_dir)
    settings = json.loads((run_dir / "training_args.json").read_text())
    (run_dir / "training_args.json").write_text(json.dumps(settings | {"max_grad_norm": 0.0, "scale_lr": True}))
    card = render_model_card(pipeline, "somebody/flow", run_dir)
    assert "learning rate 0.001 times the images of a step, cosine" in card and "gradients not clipped" in card


@pytest.mark.parametrize(
    ("id2label", "labels"),
    [
        ({0: "cat, felis", 1: "dog"}, '["cat"]'),
        ({0: "1", 1: "2"}, "[0]"),
        ({0: "crane", 1: "crane"}, "[0]"),
        ({"0": ", x"}, "[0]"),
        ({}, "[0]"),
    ],
)
def test_the_example_of_the_card_names_a_class_that_the_pipeline_reads(randomised_model, id2label, labels):
    flow = randomised_model(num_classes=2)
    assert example_call(flow.config, id2label) == f"class_labels={labels}, num_images_per_prompt=4, "
    pipeline = FlowBackPipeline(flow, id2label=id2label)
    assert pipeline.normalize_class_labels(json.loads(labels)) == [0]


def test_the_card_names_where_latents_and_stored_features_came_from(run_dir, tmp_path):
    (tmp_path / "latents").mkdir()
    settings = {"data": "imagenet-1k", "vae": "stabilityai/sd-vae-ft-ema", "resolution": 256, "teacher": "a/teacher"}
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(settings))
    more = {"train_data_dir": None, "latents": str(tmp_path / "latents"), "teacher_model_name_or_path": None}
    (run_dir / "training_args.json").write_text(json.dumps({**ARGUMENTS, **more}))
    card = render_model_card(FlowBackPipeline.from_pretrained(run_dir), "flow", run_dir)
    assert "| data | `imagenet-1k` at 256×256, as latents of `stabilityai/sd-vae-ft-ema` |" in card
    assert "| teacher | `a/teacher` |" in card
    data = huggingface_hub.ModelCard(card).data
    assert data.datasets == "imagenet-1k" and data.base_model == "a/teacher"


def test_a_pipeline_without_a_run_says_less(randomised_model):
    card = render_model_card(FlowBackPipeline(randomised_model(num_classes=None)), "somebody/flow")
    assert "An unconditional normalizing flow of 4×4 images" in card
    assert "pipe(num_images_per_prompt=4, " in card and "Guidance is off" in card
    for section in ("## Samples", "## Training", "## Measured", "## Evaluation", "Classes:", "2511.22345", "None"):
        assert section not in card


def test_a_cards_hash_tells_whether_it_was_edited(run_dir):
    card = render_model_card(FlowBackPipeline.from_pretrained(run_dir), "flow", run_dir)
    assert is_as_written(card) and is_as_written(card + "\n")
    assert not is_as_written(card.replace("cat", "car"))
    assert not is_as_written(card + "A sentence.\n")
    assert not is_as_written("# A card by hand\n")


@pytest.mark.parametrize("name", PUBLISHED_RUNS)
def test_the_cards_in_this_repository_are_what_is_written_today(name, tmp_path):
    """To the letter: after a change to the template or a sentence, write these cards again."""
    pipeline, run_dir = write_published_run(name, tmp_path)
    committed = (REPOSITORY / "model_cards" / name / "README.md").read_text(encoding="utf-8")
    assert is_as_written(committed)
    assert committed == render_model_card(pipeline, f"flowback_hf/{name}", run_dir)
    grid = Run.read(run_dir).grid.name
    assert [path.name for path in (REPOSITORY / "model_cards" / name / "samples").iterdir()] == [grid]


def test_every_card_in_this_repository_is_held_by_the_test_above():
    cards = (REPOSITORY / "model_cards").glob("*/README.md")
    assert sorted(path.parent.name for path in cards) == sorted(PUBLISHED_RUNS)


# The files of a run


def test_a_run_is_read_as_far_as_it_is_there(run_dir, tmp_path):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "valid')  # a process that was killed
    run = Run.read(run_dir)
    assert run.args == ARGUMENTS and run.metrics == METRICS and run.evaluation is None
    assert run.grid == run_dir / "samples/step-0000020.png" and run.is_aligned
    for nothing in (Run.read(None), Run.read(tmp_path / "nowhere")):
        assert nothing == Run() and not nothing.is_aligned


def test_the_run_of_a_pipeline_is_the_folder_it_was_loaded_from(run_dir, randomised_model, tmp_path):
    assert find_run(FlowBackPipeline.from_pretrained(run_dir)) == run_dir
    untrained = FlowBackPipeline(randomised_model().float())
    assert find_run(untrained) is None and find_run(untrained, run_dir) == run_dir
    untrained.save_pretrained(tmp_path / "saved")
    assert find_run(FlowBackPipeline.from_pretrained(tmp_path / "saved")) is None
    with pytest.raises(ValueError, match="`run_dir` must be an output folder of training/train_rra.py"):
        find_run(untrained, tmp_path / "saved")


def test_an_edited_card_is_told_from_a_written_one(run_dir):
    assert read_edited_card(run_dir) is None
    (run_dir / "README.md").write_text(sign("# A card\n"))
    assert read_edited_card(run_dir) is None
    edited = sign("# A card\n").replace("card", "chart")
    (run_dir / "README.md").write_text(edited)
    assert read_edited_card(run_dir) == edited


def test_cards_signed_under_the_modules_earlier_name_count_as_written():
    card = sign("# A card").replace("model_card.py", "hub.py")
    assert "written by hub.py" in card and is_as_written(card)
