import json
import shutil
from types import SimpleNamespace

import PIL.Image
import pytest


@pytest.fixture
def script(benchmark_script):
    return benchmark_script("learned_inverse")


def test_a_cell_is_recorded_once_at_the_scales_that_it_takes(script, tmp_path, monkeypatch):
    """Training and evaluation are replaced by what they leave: their own tests run them."""
    commands = []
    for name in ("images/train/a", "images/validation/a", "work", "flow/transformer"):
        (tmp_path / name).mkdir(parents=True)
    PIL.Image.new("L", (2, 2), 0).save(tmp_path / "images" / "train" / "a" / "0.png")
    PIL.Image.new("L", (2, 2), 9).save(tmp_path / "images" / "validation" / "a" / "0.png")
    config = json.dumps({"sample_size": 2, "in_channels": 1})
    (tmp_path / "flow" / "transformer" / "config.json").write_text(config)

    def run(name, *options):
        commands.append((name, [str(option) for option in options]))
        folder = options[options.index("--output_dir") + 1]
        if name.startswith("training"):
            shutil.copytree(tmp_path / "flow", folder)
            (folder / "reverse_transformer").mkdir()
            config = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.5}
            (folder / "reverse_transformer" / "config.json").write_text(json.dumps(config))
            return
        for scale in ("1.0", "1.25", "1.5", "2.0"):
            (folder / "samples" / f"guidance_{scale}").mkdir(parents=True)
            PIL.Image.new("L", (2, 2), 255).save(folder / "samples" / f"guidance_{scale}" / "000000.png")
        (folder / "evaluation.json").write_text(json.dumps({"frechet_distance/guidance_1.5": 2.5}))

    monkeypatch.setattr(script, "run", run)
    line = ["--data_dir", str(tmp_path), "--work_dir", str(tmp_path / "work"), "--results_dir", str(tmp_path)]
    line += ["--model", str(tmp_path / "flow")]
    line += ["--variants", "exact", "final", "--seeds", "3"]
    for _ in range(2):
        script.main(script.parse_args(line), line)
    assert [name for name, _ in commands] == [
        "pipelines/evaluate_flow.py",
        "training/train_reverse.py",
        "pipelines/evaluate_flow.py",
    ]
    assert "final" in commands[1][1] and "learned" in commands[2][1] and "2.0" not in commands[2][1]
    record = json.loads((tmp_path / "learned_inverse_digits" / "final-seed3.json").read_text())
    assert record["results"]["frechet_distance/guidance_1.5"] == 2.5
    assert record["results"]["nearest_training_image/guidance_1.5"] == pytest.approx(4.0)
    assert record["results"]["evaluated_guidance_scales"] == [1.0, 1.25, 1.5]


def test_images_in_parquet_files_and_of_other_sizes(script, tmp_path):
    (tmp_path / "images").mkdir()
    args = SimpleNamespace(data_dir=tmp_path)
    assert script.data_flag(args, "--train_data_dir")[0] == "--train_data_dir"
    (tmp_path / "images" / "train.parquet").touch()
    assert script.data_flag(args, "--train_data_dir") == ["--dataset_name", tmp_path / "images"]
    images = [PIL.Image.new("RGB", (4, 4), (255, 255, 255)), PIL.Image.new("L", (2, 2), 0)]
    rows = script.to_rows(images, {"sample_size": 2, "in_channels": 1})
    assert rows.tolist() == [[1.0] * 4, [-1.0] * 4]
