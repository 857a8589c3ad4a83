import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackPipeline

from ..pipelines.conftest import CLASS_NAMES, write_images


TINY_OPTIONS = (
    "--sample_size 8 --patch_size 4 --num_blocks 2 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
    " --repeats 2 --batch_size 3 --num_classes 2 50"
).split()


def test_the_cost_of_few_and_of_many_classes(benchmark_script, tmp_path, capsys):
    output = tmp_path / "new" / "classification.json"
    benchmark_script("classification").main([*TINY_OPTIONS, "--output", str(output)])
    few, many = json.loads(output.read_text())["results"]
    assert (few["num_classes"], many["num_classes"]) == (2, 50)
    assert few["gradient_time_ratio"] == few["gradient_memory_ratio"] == 1.0
    assert many["gradient_memory_ratio"] == pytest.approx(many["gradient_kib"] / few["gradient_kib"])
    for result in (few, many):
        assert 0 < result["gradient_min_ms"] <= result["gradient_median_ms"] <= result["gradient_max_ms"]
        assert result["bayes_times_slower"] == pytest.approx(result["bayes_ms"] / result["gradient_median_ms"])
    table = capsys.readouterr().out.strip()
    assert table.startswith("| classes | gradient, ms | time / 2 classes |")
    assert table in output.with_suffix(".md").read_text()


def test_the_flow_that_is_timed_tells_its_classes_apart(benchmark_script):
    benchmark = benchmark_script("classification")
    pipeline = benchmark.build_pipeline(benchmark.parse_args(TINY_OPTIONS), 50)
    scores = pipeline.class_scores(torch.rand(2, 3, 8, 8), "gradient")
    assert scores.std() > 0.01 and scores.argmax(dim=1).tolist() != [0, 0]


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--num_classes", "0", "5"], ["--batch_size", "0"]])
def test_counts_below_one_are_refused(benchmark_script, capsys, options):
    with pytest.raises(SystemExit):
        benchmark_script("classification").parse_args(options)
    assert "must be at least 1" in capsys.readouterr().err


def test_the_accuracy_of_each_method(benchmark_script, randomised_model, tmp_path, capsys):
    flow = tmp_path / "flow"
    model = randomised_model(num_classes=3, noise_std=0.1).float()
    # named in another order than the folders lie
    FlowBackPipeline(model, id2label=dict(enumerate(reversed(CLASS_NAMES)))).save_pretrained(flow)
    for seed, name in enumerate(CLASS_NAMES):
        write_images(tmp_path / "images" / name, 4, seed=seed)
    output = tmp_path / "accuracy.json"
    line = ["--flows", str(flow), "--images", str(tmp_path / "images"), "--output", str(output)]
    benchmark = benchmark_script("classification_accuracy")
    benchmark.main([*line, "--num_noise_draws", "0", "2", "--shortlist_size", "3"])
    results = json.loads(output.read_text())["results"]
    assert results["num_images"] == 12
    rows = {(row["num_noise_draws"], row["method"]): row for row in results["methods"]}
    assert len(rows) == 8
    assert rows[0, "bayes"]["agreement_with_bayes"] == rows[2, "shortlist"]["agreement_with_bayes"] == 1.0
    assert rows[0, "shortlist"]["accuracy"] == rows[0, "bayes"]["accuracy"]
    of_files = {key: row["accuracy"] for key, row in rows.items()}
    as_data_set = ["--dataset_name" if word == "--images" else word for word in line]
    benchmark.main([*as_data_set, "--split", "train", "--num_noise_draws", "0", "2", "--shortlist_size", "3"])
    results = json.loads(output.read_text())["results"]["methods"]
    assert {(row["num_noise_draws"], row["method"]): row["accuracy"] for row in results} == of_files

    # Images that lie in the folder of the class that they are read as: all of them right.
    pipeline = FlowBackPipeline.from_pretrained(flow)
    classifier = benchmark.FlowBackClassificationPipeline.from_pipe(pipeline)
    classifier.set_progress_bar_config(disable=True)
    files, names = benchmark.list_images(tmp_path / "images", max_images=6)
    assert names == 2 * CLASS_NAMES and len(files) == 6  # in turn
    shutil.rmtree(tmp_path / "images")
    rng = np.random.default_rng(7)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(12)]
    for number, (image, (best, *_)) in enumerate(zip(images, classifier(images, method="bayes", num_noise_draws=0))):
        (tmp_path / "images" / best["label"]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / best["label"] / f"{number}.png")
    benchmark.main([*line, "--num_noise_draws", "0"])
    (bayes, *_) = json.loads(output.read_text())["results"]["methods"]
    assert (bayes["method"], bayes["accuracy"]) == ("bayes", 1.0)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/digits_none"], ["digits_none"]),
        (["runs/digits_none", "runs/digits_reverse"], ["digits_none", "digits_reverse"]),
        (["cells/none/seed-0/flow", "cells/reverse/seed-1/flow"], ["none/seed-0", "reverse/seed-1"]),
        (["runs/flow", "runs/flow/checkpoints"], ["flow", "flow/checkpoints"]),
    ],
)
def test_flows_are_named_by_what_tells_their_folders_apart(benchmark_script, folders, names):
    assert benchmark_script("classification_accuracy").short_names([Path(folder) for folder in folders]) == names
