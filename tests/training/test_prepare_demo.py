import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, Dinov2Model

from flowback_hf import RepresentationTeacher
from flowback_hf.data.demo import glyphs, icons, make, networks
from flowback_hf.data.demo.kind import image_generator

from ..conftest import end_of_command, load_script


SCRIPT = Path(__file__).parents[2] / "training" / "prepare_demo.py"

DRAWN_KINDS = ("icons", "shapes")
ARGUMENTS = {
    "digits": ["--kind", "digits", "--teacher_epochs", "6", "--judge_epochs", "4"],
    **{
        kind: [
            *["--kind", kind, "--resolution", "16", "--num_train_images", "70", "--num_validation_images", "20"],
            *["--seed", "3", "--teacher_epochs", "1", "--judge_epochs", "1"],
        ]
        for kind in DRAWN_KINDS
    },
    "glyphs": [
        *["--kind", "glyphs", "--resolution", "16", "--num_train_images", "78", "--num_validation_images", "52"],
        *["--seed", "3", "--teacher_epochs", "1", "--judge_epochs", "1"],
    ],
}
KINDS = tuple(ARGUMENTS)
RESOLUTIONS = {"digits": 8, "icons": 16, "shapes": 16, "glyphs": 16}
NUM_IMAGES = {
    "digits": {"train": 1500, "validation": 297},
    **dict.fromkeys(DRAWN_KINDS, {"train": 70, "validation": 20}),
    "glyphs": {"train": 78, "validation": 52, "test": 52},
}
NUM_CLASSES = {"digits": 10, "icons": 10, "shapes": 10, "glyphs": 26}


prepare_demo = load_script(SCRIPT)


def run(line: list[str]):
    prepare_demo.main(prepare_demo.parse_args(line))


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> dict[str, Path]:
    """The folder the script made of each kind. That of the digits was there before, and empty."""
    folder = tmp_path_factory.mktemp("demos")
    (folder / "digits").mkdir()
    # One process is enough: starting Python takes seconds.
    environment = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("huggingface")), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *ARGUMENTS["digits"], "--output_dir", str(folder / "digits")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "validation accuracy" in result.stdout
    for kind in (*DRAWN_KINDS, "glyphs"):
        run([*ARGUMENTS[kind], "--output_dir", str(folder / kind)])
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def image_folders(demos, tmp_path_factory) -> dict[str, datasets.DatasetDict]:
    cache_dir = str(tmp_path_factory.mktemp("datasets"))
    folders = {kind: str(demos[kind] / "images") for kind in KINDS}
    glyphs_folder = folders.pop("glyphs")
    loaded = {
        kind: datasets.load_dataset("imagefolder", data_dir=folder, cache_dir=cache_dir)
        for kind, folder in folders.items()
    }
    return loaded | {"glyphs": datasets.load_dataset(glyphs_folder, cache_dir=cache_dir)}


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_report(folder: Path) -> dict:
    return json.loads((folder / "demo.json").read_text())


def images_are_equal(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def test_nothing_but_the_finished_folders_is_left_behind(demos):
    assert {path.name for path in demos["digits"].parent.iterdir()} == set(KINDS)
    for folder in demos.values():
        assert {path.name for path in folder.iterdir()} == {"images", "teacher", "judge", "demo.json"}
        for network in ("teacher", "judge"):
            names = {path.name for path in (folder / network).iterdir()}
            assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_load_with_datasets(image_folders, demos, kind):
    splits = image_folders[kind]
    assert {split: len(images) for split, images in splits.items()} == NUM_IMAGES[kind]
    class_names = splits["train"].features["label"].names
    assert len(class_names) == NUM_CLASSES[kind]
    assert class_names == read_report(demos[kind])["class_names"]
    for images in splits.values():
        assert set(images["label"]) == set(range(NUM_CLASSES[kind]))
        sizes = {image.size for image in images["image"]}
        assert sizes == {(RESOLUTIONS[kind], RESOLUTIONS[kind])}


@pytest.mark.parametrize("kind", [*DRAWN_KINDS, "glyphs"])
def test_the_classes_of_drawn_images_are_balanced(image_folders, kind):
    for images in image_folders[kind].values():
        assert set(np.bincount(images["label"])) == {len(images) // NUM_CLASSES[kind]}


def test_the_digits_are_those_of_scikit_learn_each_once(image_folders):
    values = load_digits().images
    expected = sorted(np.round(image / 16 * 255).astype(np.uint8).tobytes() for image in values)
    found = [image for images in image_folders["digits"].values() for image in images["image"]]
    assert {image.mode for image in found} == {"L"}
    assert sorted(np.asarray(image).tobytes() for image in found) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["teacher", "judge"])
def test_the_image_processor_only_rescales_and_makes_three_channels(image_folders, demos, kind, network):
    image = image_folders[kind]["train"][0]["image"]
    processor = AutoImageProcessor.from_pretrained(demos[kind] / network)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixel_values[0], expected)
    larger = processor(image.resize((24, 40)), return_tensors="pt").pixel_values
    assert larger.shape == pixel_values.shape


@pytest.mark.parametrize(
    "kind, num_patches", [("digits", 4 * 4), ("icons", 8 * 8), ("shapes", 8 * 8), ("glyphs", 4 * 4)]
)
def test_the_teacher_is_a_dinov2_backbone_that_has_been_trained(demos, kind, num_patches):
    teacher = AutoModel.from_pretrained(demos[kind] / "teacher")
    assert type(teacher) is Dinov2Model
    resolution = RESOLUTIONS[kind]
    tokens = teacher(torch.zeros(1, 3, resolution, resolution)).last_hidden_state
    assert tokens.shape == (1, 1 + num_patches, teacher.config.hidden_size)
    report = read_report(demos[kind])
    untrained = networks.make_teacher(
        resolution, teacher.config.patch_size, report["class_names"], report["seed"]
    ).dinov2.state_dict()
    # The mask token is for DINOv2's own pre-training, and the key bias cannot change the softmax but by rounding.
    for name, weight in teacher.state_dict().items():
        if "mask_token" not in name and "k_proj.bias" not in name:
            assert not torch.equal(weight, untrained[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_judge_has_the_reported_accuracy_and_knows_the_class_names(image_folders, demos, kind):
    judge = AutoModelForImageClassification.from_pretrained(demos[kind] / "judge")
    processor = AutoImageProcessor.from_pretrained(demos[kind] / "judge")
    report = read_report(demos[kind])
    assert judge.config.model_type == "resnet"
    assert judge.config.id2label == dict(enumerate(report["class_names"]))
    assert judge.config.label2id == {name: label for label, name in enumerate(report["class_names"])}
    images = image_folders[kind]["validation"]
    with torch.no_grad():
        logits = judge(**processor(list(images["image"]), return_tensors="pt")).logits
    accuracy = (logits.argmax(dim=1) == torch.tensor(images["label"])).float().mean().item()
    assert accuracy == pytest.approx(report["judge_validation_accuracy"])


def test_both_networks_learn_the_digits(demos):
    report = read_report(demos["digits"])
    assert report["teacher_validation_accuracy"] > 0.4
    assert report["judge_validation_accuracy"] > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_images_and_weights_to_the_bit(demos, tmp_path, kind):
    run([*ARGUMENTS[kind], "--output_dir", str(tmp_path / "again")])
    first, second = read_files(demos[kind]), read_files(tmp_path / "again")
    first_report, second_report = json.loads(first.pop("demo.json")), json.loads(second.pop("demo.json"))
    assert first == second
    assert set(first_report.pop("seconds")) == set(second_report.pop("seconds")) == {"images", "teacher", "judge"}
    assert first_report == second_report


def draw_glyph_image(seed: int, split: str, index: int, resolution: int) -> Image.Image:
    rng = image_generator(seed, split, index)
    return glyphs.draw_glyph(rng, index % len(glyphs.LETTERS), resolution)


def test_glyphs_depend_on_seed_split_and_index_only(image_folders):
    """Any row can be drawn alone; the judge's images are those of no other split."""
    for split, images in image_folders["glyphs"].items():
        for index in (0, 5, 25):
            image = draw_glyph_image(3, split, index, 16)
            assert image.mode == "L"
            assert images_are_equal(image, images[index]["image"])
            assert images[index]["label"] == index
    drawn = [draw_glyph_image(*arguments, 16) for arguments in [(3, "judge", 0), (4, "train", 0)]]
    drawn += [images[0]["image"] for images in image_folders["glyphs"].values()]
    assert len({image.tobytes() for image in drawn}) == 5


def test_a_glyph_has_another_shape_in_each_class_and_contrast_of_either_sign():
    """Without clutter and at one size, the masks of a typeface tell all classes apart."""

    def ink(letter):
        return glyphs.draw_mask(np.random.default_rng(7), letter, 64)

    masks = {letter: ink(letter) for letter in glyphs.LETTERS}
    assert all(mask.max() > 0.99 and 0.02 < mask.mean() < 0.5 for mask in masks.values())
    for first, second in itertools.combinations(masks.values(), 2):
        assert np.abs(first - second).mean() > 0.01
    signs = set()
    for index in range(26 * 4):
        image = np.asarray(draw_glyph_image(0, "train", index, 16), dtype=float)
        signs.add(np.sign(np.abs(image - image.min()).mean() - np.abs(image - image.max()).mean()))
    assert signs == {-1.0, 1.0}


def test_the_teacher_of_the_glyphs_classifies_by_its_patch_tokens_only():
    teacher = networks.make_patch_teacher(16, 4, list(glyphs.LETTERS), seed=0).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    tokens = teacher.dinov2(pixel_values).last_hidden_state
    expected = teacher.classifier(tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(teacher(pixel_values).logits, expected)
    assert tokens.shape == (2, 1 + 16, 64) and expected.shape == (2, 26)


def test_the_judge_of_the_glyphs_is_trained_on_images_of_its_own(monkeypatch, tmp_path):
    seen = {}

    def fit(model, pixel_values, labels, num_epochs, quarter_turns, seed, description):
        seen[description] = pixel_values["train"]
        return 0.5

    monkeypatch.setattr(make, "fit_and_measure", fit)
    (tmp_path / "demo").mkdir()
    make.make_demo(tmp_path / "demo", "glyphs", 3, 16, {"train": 70, "validation": 26}, 1, 1)
    assert len(seen["teacher"]) == 70 and len(seen["judge"]) == 24
    first = networks.make_image_processor(16)(draw_glyph_image(3, "judge", 0, 16), return_tensors="pt")
    assert torch.equal(seen["judge"][0], first.pixel_values[0])
    assert {path.name for path in (tmp_path / "demo" / "images").iterdir()} == {
        "train.parquet", "validation.parquet", "test.parquet"
    }  # fmt: skip


def test_a_second_teacher_is_trained_without_labels(demos, tmp_path, capsys):
    line = [*ARGUMENTS["glyphs"], "--mae_epochs", "2", "--output_dir"]
    run([*line, str(tmp_path / "demo")])
    first, second = read_files(demos["glyphs"]), read_files(tmp_path / "demo")
    report = json.loads(second.pop("demo.json"))
    printed = capsys.readouterr().out
    probed = report["mae_linear_probe_accuracy"]
    assert f"teacher_mae: {probed:.1%} validation accuracy of a linear probe (epochs: 2)" in printed
    assert 0 < probed < 1 and report["seconds"]["mae"] > 0 and "mae_epochs" not in read_report(demos["glyphs"])
    # all else is as without it, to the bit
    assert {name: content for name, content in second.items() if "teacher_mae" not in name} == {
        name: content for name, content in first.items() if name != "demo.json"
    }

    teacher = RepresentationTeacher.from_pretrained(tmp_path / "demo" / "teacher_mae", grid_size=4)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    assert teacher(images).shape == (2, 16, 64)
    untrained = networks.make_masked_autoencoder(16, 4, seed=3).vit.state_dict()
    moved = [name for name, weight in teacher.encoder.state_dict().items() if not torch.equal(weight, untrained[name])]
    assert len(moved) > 30

    # labels play no part in it
    pixel_values = networks.make_image_processor(16)(
        [draw_glyph_image(3, "train", index, 16) for index in range(78)], return_tensors="pt"
    ).pixel_values
    again = networks.make_masked_autoencoder(16, 4, seed=3)
    networks.train_masked_autoencoder(again, pixel_values, 2, quarter_turns=False, seed=3)
    assert all(torch.equal(again.vit.state_dict()[name], teacher.encoder.state_dict()[name]) for name in moved)


def test_a_masked_autoencoder_learns_what_it_does_not_see():
    torch.manual_seed(0)
    signs = torch.randint(2, (256, 1, 1, 1)) * 2.0 - 1
    images = signs * torch.linspace(-1, 1, 16).expand(3, 16, 16)  # a patch tells the sign of all others
    model = networks.make_masked_autoencoder(16, 4, seed=0)
    noise = torch.rand(256, 16)

    networks.train_masked_autoencoder(model, images, num_epochs=30, quarter_turns=False, seed=0)
    with torch.no_grad():
        error = model.eval()(images, noise=noise).loss.item()
    assert error < 0.5  # 1 is the variance of a patch


def test_the_probe_of_a_teacher_reads_its_patch_tokens():
    """Classes that differ by a patch only, which every encoder sees, are told apart; random labels are not."""
    torch.manual_seed(0)
    labels = {"train": torch.arange(60) % 2, "validation": torch.arange(40) % 2}
    pixel_values = {split: 0.1 * torch.randn(len(own), 3, 16, 16) for split, own in labels.items()}
    for split, own in labels.items():
        pixel_values[split][own == 1, :, :4, :4] += 1.0
    teacher = RepresentationTeacher(networks.make_masked_autoencoder(16, 4, seed=0).vit, grid_size=4)
    assert networks.probe_teacher(teacher, pixel_values, labels) == 1.0
    pixel_values["validation"] = 0.1 * torch.randn(40, 3, 16, 16)
    assert networks.probe_teacher(teacher, pixel_values, labels) < 0.8


def test_a_missing_typeface_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "TYPEFACES", (*glyphs.TYPEFACES[:2], "Garamond", "Bodoni"))
    line = [*ARGUMENTS["glyphs"], "--output_dir", str(tmp_path / "demo")]
    assert "typefaces of matplotlib, but Garamond, Bodoni are not in" in end_of_command(SCRIPT, line, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_a_second_teacher_without_scikit_learn_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    line = [*ARGUMENTS["glyphs"], "--mae_epochs", "1", "--output_dir", str(tmp_path / "demo")]
    assert '--mae_epochs needs scikit-learn: pip install "flowback_hf[demo]"' in end_of_command(
        SCRIPT, line, monkeypatch
    )
    assert list(tmp_path.iterdir()) == []


def test_glyphs_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = [*ARGUMENTS["glyphs"], "--output_dir", str(tmp_path / "demo")]
    assert 'come with matplotlib: pip install "flowback_hf[demo]"' in end_of_command(SCRIPT, line, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_the_script_knows_how_many_classes_each_kind_has():
    assert prepare_demo.NUM_CLASSES == {kind: len(own.class_names) for kind, own in make.KINDS.items()}
    assert set(prepare_demo.DEFAULTS) == set(make.KINDS)


def make_splits(kind: str, seed: int, **num_images: int) -> dict[str, tuple[list[Image.Image], list[int]]]:
    return make.KINDS[kind].make_splits(seed, RESOLUTIONS[kind], num_images)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_other_images(kind):
    first, second = (make_splits(kind, seed, train=12, validation=12)["validation"][0] for seed in (0, 1))
    assert not all(images_are_equal(*pair) for pair in zip(first, second))


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_the_two_splits_differ(kind):
    splits = make_splits(kind, seed=0, train=12, validation=12)
    assert not any(images_are_equal(*pair) for pair in zip(splits["train"][0], splits["validation"][0]))


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_a_drawn_image_does_not_depend_on_how_many_are_made(demos, kind):
    for split, (images, labels) in make_splits(kind, seed=3, train=12, validation=10).items():
        for index, (image, label) in enumerate(zip(images, labels)):
            class_name = make.KINDS[kind].class_names[label]
            saved = Image.open(demos[kind] / "images" / split / class_name / f"{index:05d}.png")
            assert images_are_equal(image, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_the_classes_are_in_the_order_of_an_image_folder(kind):
    names = make.KINDS[kind].class_names
    assert len(names) == NUM_CLASSES[kind]
    assert names == sorted(names)


@pytest.mark.parametrize("name", icons.ICON_OUTLINES)
def test_the_whole_icon_is_in_the_image(name):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        silhouette = np.asarray(icons.draw_silhouette(rng, *icons.ICON_OUTLINES[name], size=128))
        edges = np.concatenate([silhouette[0], silhouette[-1], silhouette[:, 0], silhouette[:, -1]])
        assert silhouette.any() and not edges.any()


@pytest.mark.parametrize(
    "lightness, chroma, hue, rgb",
    [(0, 0, 0, (0, 0, 0)), (1, 0, 0, (255, 255, 255)), (0.62796, 0.25768, 29.234, (255, 0, 0))],
    ids=["black", "white", "red"],
)
def test_oklch_colors_are_those_of_css(lightness, chroma, hue, rgb):
    np.testing.assert_allclose(icons.oklch_color(lightness, chroma, np.radians(hue)), rgb, atol=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kind", "digits", "--resolution", "8"], "--resolution 8 was given with --kind digits"),
        (["--kind", "digits", "--num_train_images", "99"], "--num_train_images 99 was given with --kind digits"),
        (["--kind", "digits", "--num_validation_images", "99"], "--num_validation_images 99 was given"),
        (["--kind", "shapes", "--resolution", "12"], "--resolution must be a positive multiple of 8, not 12"),
        (["--kind", "shapes", "--resolution", "0"], "argument --resolution: must be a whole number of at least 1"),
        (["--kind", "shapes", "--num_train_images", "9"], "--num_train_images must be at least 10"),
        (["--kind", "glyphs", "--num_train_images", "25"], "--num_train_images must be at least 26"),
        (
            ["--kind", "shapes", "--num_validation_images", "0"],
            "argument --num_validation_images: must be a whole number",
        ),
        (
            ["--kind", "digits", "--teacher_epochs", "0"],
            "argument --teacher_epochs: must be a whole number of at least 1, but is 0",
        ),
        (
            ["--kind", "shapes", "--judge_epochs", "-1"],
            "argument --judge_epochs: must be a whole number of at least 1, but is -1",
        ),
        (
            ["--kind", "digits", "--seed", "-1"],
            "argument --seed: must be a whole number of at least 0 and below 4294967296, but is -1",
        ),
        (["--kind", "cats"], "invalid choice: 'cats'"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch, arguments, message):
    line = [*arguments, "--output_dir", str(tmp_path / "parent" / "demo")]
    assert message in end_of_command(SCRIPT, line, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_a_file_as_output_dir_is_refused(tmp_path, monkeypatch):
    (tmp_path / "demo").write_text("mine")
    line = [*ARGUMENTS["shapes"], "--output_dir", str(tmp_path / "demo")]
    assert "is a file" in end_of_command(SCRIPT, line, monkeypatch)
    assert (tmp_path / "demo").read_text() == "mine"


def test_a_folder_with_something_in_it_is_refused_and_left_as_it_was(tmp_path, monkeypatch):
    output_dir = tmp_path / "demo"
    output_dir.mkdir()
    (output_dir / "notes.txt").write_text("mine")
    line = [*ARGUMENTS["shapes"], "--output_dir", str(output_dir)]
    assert f"--output_dir {output_dir} is not empty" in end_of_command(SCRIPT, line, monkeypatch)
    assert read_files(tmp_path) == {"demo/notes.txt": b"mine"}


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments):
        assert [path.name for path in tmp_path.glob(".demo-*/demo/teacher")] == ["teacher"]
        raise RuntimeError("out of luck")

    monkeypatch.setattr(make, "make_judge", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        run([*ARGUMENTS["shapes"], "--output_dir", str(tmp_path / "demo")])
    assert list(tmp_path.iterdir()) == []
