"""The benchmark of a demo flow's samples, on a random flow and a judge that always reads the same."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.data.demo.networks import make_image_processor, make_judge


CLASS_NAMES = ["circle", "cross"]


@pytest.fixture
def demo(tmp_path):
    """A data set of four images with a judge that takes every image for a cross, and a run."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in CLASS_NAMES:
            folder = tmp_path / "data" / "images" / split / name
            folder.mkdir(parents=True)
            PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "0.png")
    judge = make_judge(CLASS_NAMES, seed=0)
    torch.nn.init.zeros_(judge.classifier[1].weight)
    judge.classifier[1].bias.data = torch.tensor([0.0, 1.0])
    judge.save_pretrained(tmp_path / "data" / "judge")
    make_image_processor(8).save_pretrained(tmp_path / "data" / "judge")

    flow = TarFlowTransformer2DModel(
        8, 4, 3, num_blocks=2, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    folder = tmp_path / "flow"
    FlowBackPipeline(flow, id2label=dict(enumerate(CLASS_NAMES))).save_pretrained(folder)
    (folder / "training_args.json").write_text(json.dumps({"train_batch_size": 4}))
    records = [{"step": 0, "validation_nll": 1.0}]
    records += [{"step": step, "images_per_second": speed} for step, speed in zip((10, 30), (8, 4))]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return tmp_path


def run_benchmark(benchmark_script, demo) -> dict:
    output = demo / "results.json"
    line = ["--model", str(demo / "flow"), "--data_dir", str(demo / "data"), "--images_per_class", "3"]
    line += ["--guidance_scales", "1", "2", "--batch_size", "4", "--output", str(output)]
    benchmark_script("demo_samples").main(line)
    return json.loads(output.read_text())["results"]


def test_the_judge_reads_one_class_of_two(benchmark_script, demo):
    images = run_benchmark(benchmark_script, demo)["images"]
    assert [case["num_images"] for case in images] == [2, 6, 6]
    assert [case["judge_reads_label"] for case in images] == [0.5] * 3
    assert [case["judge_reads_label_by_class"] for case in images] == [{"circle": 0, "cross": 1}] * 3


def test_a_copy_of_a_training_image_has_no_distance(benchmark_script, demo):
    folder = demo / "data" / "images"
    first, second = (
        np.asarray(PIL.Image.open(folder / split / "cross" / "0.png"), dtype=float) / 255
        for split in ("train", "validation")
    )
    distance = run_benchmark(benchmark_script, demo)["images"][0]["distance_to_nearest_training_image"]
    assert 0 < distance["smallest"] <= ((first - second) ** 2).mean() ** 0.5
    (folder / "train" / "cross" / "copy.png").write_bytes((folder / "validation" / "cross" / "0.png").read_bytes())
    distance = run_benchmark(benchmark_script, demo)["images"][0]["distance_to_nearest_training_image"]
    assert distance["smallest"] == pytest.approx(0, abs=1e-4) and distance["median"] > 0


def test_the_seconds_of_a_training_are_those_of_its_log(benchmark_script, demo):
    training = run_benchmark(benchmark_script, demo)["training"]
    assert training == {
        "num_steps": 30,
        "batch_size": 4,
        "wall_seconds": 10 * 4 / 8 + 20 * 4 / 4,
        "seconds_per_step": (4 / 8 + 4 / 4) / 2,
    }
