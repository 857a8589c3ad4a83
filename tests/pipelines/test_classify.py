import csv

import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackClassificationPipeline

from ..conftest import command_line
from .conftest import CLASS_NAMES, write_images


def run(script, **options):
    classify = script("classify")
    classify.main(classify.parse_args(command_line(device="cpu", **options)))


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_in_a_table_out(script, model_folder, image_folder, tmp_path, capsys):
    folder = image_folder / "validation"
    output = tmp_path / "new" / "table.csv"
    run(script, model=model_folder, images=folder, output=output, top_k=2, batch_size=5, seed=3)
    table = read_table(output)
    files = sorted(folder.rglob("*.png"))
    assert [row["file"] for row in table] == [str(file) for file in files]
    assert list(table[0]) == ["file", "label_1", "score_1", "label_2", "score_2"]

    pipeline = FlowBackClassificationPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(files, top_k=2, generator=torch.Generator().manual_seed(3), batch_size=5)
    for row, classes in zip(table, expected):
        assert [row["label_1"], row["label_2"]] == [entry["label"] for entry in classes]
        assert float(row["score_1"]) == pytest.approx(classes[0]["score"], rel=1e-4)
        assert row["label_1"] in CLASS_NAMES
    printed = capsys.readouterr()
    assert printed.out == "" and "12 images classified by 'shortlist'" in printed.err and "skipped" not in printed.err
    assert [path.name for path in output.parent.iterdir()] == ["table.csv"]


def test_the_table_is_printed_unless_a_file_is_named(
    script, model_folder, image_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = {"model": model_folder, "images": image_folder / "validation", "top_k": 1}
    run(script, output=tmp_path / "table.csv", **options)
    capsys.readouterr()
    run(script, **options)
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert printed == read_table(tmp_path / "table.csv") and len(printed) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_what_is_no_image_is_skipped_counted_and_named(script, model_folder, tmp_path, capsys):
    write_images(tmp_path / "images" / "deep", 3, seed=0)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    whole = (tmp_path / "images" / "deep" / "0.png").read_bytes()
    (tmp_path / "images" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / ".hidden").write_text("not looked at")
    PIL.Image.new("P", (4, 4)).save(tmp_path / "images" / "palette.png")
    run(script, model=model_folder, images=tmp_path / "images", output=tmp_path / "table.csv", method="bayes")
    printed = capsys.readouterr().err
    assert "4 images classified by 'bayes'" in printed
    assert "2 files cannot be used and were skipped" in printed
    assert "notes.txt" in printed and "truncated.png" in printed and ".hidden" not in printed
    table = read_table(tmp_path / "table.csv")
    assert [row["file"].rsplit("/")[-1] for row in table] == ["0.png", "1.png", "2.png", "palette.png"]
    scores = [sum(float(row[f"score_{rank}"]) for rank in (1, 2, 3)) for row in table]
    assert scores == pytest.approx([1.0] * 4)


def test_images_of_another_size(script, model_folder, tmp_path):
    write_images(tmp_path / "images", 2, seed=0, size=(6, 9))
    with pytest.warns(UserWarning, match="Images that are not 4x4 pixels are resized and center-cropped"):
        run(script, model=model_folder, images=tmp_path / "images", output=tmp_path / "table.csv")
    with pytest.raises(ValueError, match="Image 0, '.*0.png', must be 4x4 pixels of mode RGB, but is 6x9"):
        run(script, model=model_folder, images=tmp_path / "images", output=tmp_path / "strict.csv", strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "table.csv"]


# Bad input


def test_nothing_to_classify(script, model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`--images` must hold at least one image, but .*empty is empty"):
        run(script, model=model_folder, images=tmp_path / "empty", output=tmp_path / "table.csv")
    with pytest.raises(ValueError, match="`--images` must be existing files or folders, but '.*nowhere' is neither"):
        run(script, model=model_folder, images=tmp_path / "nowhere", output=tmp_path / "table.csv")
    (tmp_path / "empty" / "a.txt").write_text("no image")
    with pytest.raises(
        ValueError,
        match="None of the 1 files is an image that can be used. The first: .*a.txt cannot be read",
    ):
        run(script, model=model_folder, images=tmp_path / "empty", output=tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize("device", ["gpu7", "meta:x"])
def test_a_device_that_is_none_is_refused(script, model_folder, image_folder, device):
    classify = script("classify")
    with pytest.raises(ValueError, match=f"`--device` '{device}' cannot be used: Invalid device string"):
        classify.main(classify.parse_args(command_line(model=model_folder, images=image_folder, device=device)))


@pytest.mark.parametrize("option, value, minimum", [("top_k", 0, 1), ("batch_size", 0, 1), ("num_noise_draws", -1, 0)])
def test_the_parser_refuses_numbers(script, capsys, option, value, minimum):
    with pytest.raises(SystemExit):
        script("classify").parse_args(command_line(model="m", images="i", **{option: value}))
    assert (
        f"argument --{option}: must be a whole number of at least {minimum}, but is {value}" in capsys.readouterr().err
    )


def test_an_unconditional_flow_is_refused(script, unconditional_folder, image_folder, tmp_path):
    with pytest.raises(ValueError, match="This flow is unconditional"):
        run(script, model=unconditional_folder, images=image_folder, output=tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()
