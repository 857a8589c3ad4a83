import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackPipeline
from flowback_hf.data import make_generator
from flowback_hf.evaluation import choose_class_labels

from ..conftest import REPOSITORY, command_line


def run(script, **options):
    sample = script("sample")  # with its parser: standard library only
    sample.main(sample.parse_args(command_line(**options)))


def pixels_of(folder):
    return {path.name: np.asarray(PIL.Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))}


def assert_same_images(folder, other):
    images, others = pixels_of(folder), pixels_of(other)
    assert images.keys() == others.keys() and len(images) > 0
    for name in images:
        # a batch of another size may round a pixel the other way
        assert np.abs(images[name].astype(int) - others[name]).max() <= 1, name


def test_images_labels_grid_and_settings(script, model_folder, tmp_path):
    run(script, model=model_folder, class_labels=["cat", 0], num_images=5, output_dir=tmp_path / "out", batch_size=2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "000003.png", "000004.png", "grid.png", "sampling.json"]
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert settings["class_labels"] == [2, 0] and settings["guidance_scale"] == 1.5

    pipeline = FlowBackPipeline.from_pretrained(model_folder)
    (expected,) = pipeline(class_labels=[0], generator=make_generator(0, 3)).images
    assert np.abs(np.asarray(expected).astype(int) - pixels_of(tmp_path / "out")["000003.png"]).max() <= 1
    # two rows, of three and of two images
    grid = PIL.Image.open(tmp_path / "out" / "grid.png")
    assert grid.width > 1.2 * grid.height


def test_images_do_not_depend_on_batches_and_a_run_can_be_extended(script, model_folder, tmp_path):
    options = {"model": model_folder, "num_images": 7, "guidance_scale": 2.0}
    run(script, output_dir=tmp_path / "whole", batch_size=7, **options)
    run(script, output_dir=tmp_path / "extended", batch_size=3, **{**options, "num_images": 4})
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "extended").glob("[0-9]*.png")}
    run(script, output_dir=tmp_path / "extended", batch_size=2, **options)
    assert all(path.stat().st_mtime_ns == made_at for path, made_at in first.items()) and len(first) == 4
    assert_same_images(tmp_path / "whole", tmp_path / "extended")
    run(script, output_dir=tmp_path / "other", seed=1, **options)
    with pytest.raises(AssertionError):
        assert_same_images(tmp_path / "whole", tmp_path / "other")


def test_a_killed_run_goes_on_where_it_was(script, model_folder, tmp_path):
    options = {"model": model_folder, "num_images": 3000, "batch_size": 10}
    line = command_line(output_dir=tmp_path / "killed", **options)
    command = [sys.executable, str(REPOSITORY / "pipelines" / "sample.py"), *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, **quiet)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "000099.png").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("[0-9]*.png")}
    assert 100 <= len(made) < 3000, "the run ended before it was killed"
    for path in made:
        PIL.Image.open(path).load()  # whole, each of them

    run(script, **{**options, "num_images": len(made) + 20}, output_dir=tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == made_at for path, made_at in made.items())
    run(script, **{**options, "num_images": len(made) + 20}, output_dir=tmp_path / "whole")
    assert_same_images(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".partial-*"))


def test_adms_npz(script, model_folder, tmp_path):
    run(script, model=model_folder, num_images=5, output_dir=tmp_path, npz=True)
    with np.load(tmp_path / "samples_5x4x4x3.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (5, 4, 4, 3)
    np.testing.assert_array_equal(images, np.stack(list(pixels_of(tmp_path).values())))
    assert labels.tolist() == [0, 1, 2, 0, 1]


def test_an_unconditional_flow(script, unconditional_folder, tmp_path):
    options = {"model": unconditional_folder, "num_images": 11, "npz": True}
    run(script, guidance_scale=1.5, guidance_temperature=2.0, output_dir=tmp_path, **options)
    assert len(pixels_of(tmp_path)) == 11
    with np.load(tmp_path / "samples_11x4x4x3.npz") as file:
        assert file["arr_1"].tolist() == [-1] * 11


def test_the_command_reads_labels_as_the_pipeline_does(randomised_model):
    pipeline = FlowBackPipeline(randomised_model(), id2label={0: "4", 1: "cat"})
    assert choose_class_labels(pipeline, ["name:4", "id:4", "cat", "3", "-1"]) == [0, 4, 1, 3, -1]
    with pytest.raises(ValueError, match="'4' is the name of class 0 and the number of class 4"):
        choose_class_labels(pipeline, ["4"])


# Bad input


def test_another_runs_folder_is_refused(script, model_folder, tmp_path):
    run(script, model=model_folder, num_images=2, output_dir=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"other settings: seed \(0 then, 1 now\), guidance_scale \(1.5 then, 2.0 now"
    ):
        run(script, model=model_folder, num_images=2, seed=1, guidance_scale=2.0, output_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_images_of_another_origin_are_not_taken_for_samples(script, model_folder, tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "000000.png")
    with pytest.raises(ValueError, match="holds images, but no sampling.json that says how they were made"):
        run(script, model=model_folder, num_images=2, output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.png"]


def test_images_of_other_weights_in_the_same_folder_are_refused(script, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    run(script, model=folder, num_images=2, output_dir=tmp_path / "samples")
    pipeline = FlowBackPipeline.from_pretrained(folder)
    pipeline.transformer.blocks[0].proj_out.bias.data.add_(1.0)
    pipeline.save_pretrained(folder)
    with pytest.raises(ValueError, match="samples holds what was made with other settings: model_hash .* or delete"):
        run(script, model=folder, num_images=4, output_dir=tmp_path / "samples")

    settings = json.loads((tmp_path / "samples" / "sampling.json").read_text())
    del settings["model_hash"]  # as an earlier version left it
    (tmp_path / "samples" / "sampling.json").write_text(json.dumps(settings))
    run(script, model=folder, num_images=4, output_dir=tmp_path / "samples")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_labels": ["dog"]}, "'dog' is not one. The nearest known ones are"),
        ({"class_labels": [3]}, "`class_labels` must lie between 0 and 2"),
        ({"guidance_scale": 1.0, "guidance_temperature": 0.7}, "`guidance_temperature` is 0.7, but guidance is off"),
    ],
)
def test_bad_arguments_leave_nothing(script, model_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(script, model=model_folder, output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_labels_for_an_unconditional_flow_raise(script, unconditional_folder, tmp_path):
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model"):
        run(script, model=unconditional_folder, class_labels=[1], output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 0.5}, "argument --guidance_scale: must be a finite number of at least 1, but is 0.5"),
        ({"seed": -1}, "argument --seed: must be a whole number of at least 0 and below 4294967296, but is -1"),
        ({"tolerance": -1}, "argument --tolerance: must be a finite number of at least 0, but is -1.0"),
        ({"tolerance": "nan"}, "argument --tolerance: must be a finite number of at least 0, but is nan"),
        ({"guidance_temperature": 0}, "argument --guidance_temperature: must be a finite number above 0, but is 0.0"),
    ],
)
def test_the_parser_refuses_numbers(script, capsys, options, message):
    with pytest.raises(SystemExit):
        script("sample").parse_args(command_line(model="m", output_dir="o", **options))
    assert message in capsys.readouterr().err


def test_the_tolerance_is_the_solvers(script, model_folder, tmp_path):
    options = {"model": model_folder, "num_images": 3, "solver": "jacobi"}
    run(script, output_dir=tmp_path / "exact", tolerance=0, **options)
    run(script, output_dir=tmp_path / "sloppy", tolerance=100, **options)
    run(script, output_dir=tmp_path / "sequential", **{**options, "solver": "sequential"})
    assert_same_images(tmp_path / "exact", tmp_path / "sequential")
    with pytest.raises(AssertionError):
        assert_same_images(tmp_path / "sloppy", tmp_path / "sequential")
    assert json.loads((tmp_path / "sloppy" / "sampling.json").read_text())["tolerance"] == 100


@pytest.mark.parametrize("option", ["num_images", "batch_size"])
def test_the_parser_refuses_counts_below_one(script, capsys, option):
    with pytest.raises(SystemExit):
        script("sample").parse_args(command_line(model="m", output_dir="o", **{option: 0}))
    assert f"argument --{option}: must be a whole number of at least 1, but is 0" in capsys.readouterr().err


def test_noise_is_a_function_of_the_seed_and_the_images_number():
    draws = [torch.rand(3, generator=make_generator(*entropy)) for entropy in ((0, 5), (0, 6), (1, 6))]
    assert torch.equal(draws[0], torch.rand(3, generator=make_generator(0, 5)))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize(
    "name, options",
    [
        ("sample", {}),
        ("classify", {"images": "."}),
        ("evaluate_flow", {"data_dir": "."}),
    ],
)
def test_a_model_that_is_nowhere_is_said(script, tmp_path, monkeypatch, name, options):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    module = script(name)
    if name == "classify":
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
        options = {"images": tmp_path}
    else:
        options = {**options, "output_dir": tmp_path / "out"}
    message = "`--model` must be a folder that holds a saved pipeline, or its id on the Hub, but 'nowhere/flow' is ne"
    with pytest.raises(ValueError, match=message):
        line = command_line(model="nowhere/flow", **options)
        module.main(module.parse_args(line), *([line] if name == "evaluate_flow" else []))
    assert not (tmp_path / "out").exists()
