"""The benchmark of a demo flow's samples, on a random flow and a judge that always reads the same."""

import json

import numpy as np
import PIL.Image
import pytest


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
