import itertools
import json
import math
import os

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from flowback_hf import FlowBackPipeline, RepresentationTeacher
from flowback_hf.data import (
    DataSource,
    LatentDataset,
    LatentSource,
    RowGenerator,
    Splits,
    Stream,
    load_latents,
    make_generator,
)
from flowback_hf.data.images import checksum
from flowback_hf.data.latent_encoding import LatentEncoder, columns_of, describe_latents, encode_split, open_streams
from flowback_hf.data.latents import LatentReader, draw_latents, hash_weights, load_vae

from ..conftest import REPOSITORY, command_line, load_script, write_images
from .test_train_rra import read_metrics


@pytest.fixture(scope="module")
def precompute_latents():
    return load_script(REPOSITORY / "training" / "precompute_latents.py")


@pytest.fixture
def vae_dir(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def latents_arguments(images, vae_dir, tmp_path):
    """The command line for the tiny runs' images, as a function of what differs."""

    def build(**options) -> list[str]:
        options = {
            "train_data_dir": images,
            "vae_model_name_or_path": vae_dir,
            "resolution": 8,
            "images_per_shard": 8,
            "batch_size": 5,
            "output_dir": tmp_path / "latents",
            **options,
        }
        return command_line(**options)

    return build


@pytest.fixture
def latent_run(arguments, vae_dir, tmp_path):
    """The command line of a tiny run on latents: samples of 4x4 with 4 channels, 4 tokens."""

    def build(**options) -> list[str]:
        options = {
            "train_data_dir": None,
            "latents": tmp_path / "latents",
            "resolution": None,
            "noise_std": 0.2,
            "output_dir": tmp_path / "run",
            **options,
        }
        return arguments(**options)

    return build


def run(script, line):
    script.main(script.parse_args(line))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# What is written


def test_moments_of_both_flips_the_image_and_the_label(
    precompute_latents, latents_arguments, images, vae_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    run(precompute_latents, latents_arguments(image_size=4))
    # a stream: nothing of the source is cached
    assert not any(path.stat().st_size for path in (tmp_path / "datasets_cache").rglob("*") if path.is_file())
    folder = tmp_path / "latents"
    shards = [f"train/00000-0000{number}.parquet" for number in range(3)]
    assert names(folder) == ["latents.json", *shards, "train/00000.json",
                             "validation/00000-00000.parquet", "validation/00000.json"]  # fmt: skip
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    assert f"26 images, {num_bytes / 26 / 1000:.1f} kB an image, " in capsys.readouterr().out

    settings = json.loads((folder / "latents.json").read_text())
    vae = AutoencoderKL.from_pretrained(vae_dir).eval()
    assert settings["vae_hash"] == hash_weights(vae)
    assert (settings["latent_channels"], settings["latent_size"], settings["image_size"]) == (4, 4, 4)
    rows = load_latents(folder, tmp_path / "cache")
    assert {name: len(split) for name, split in rows.items()} == {"train": 20, "validation": 6}
    assert rows["train"].features["label"].names == ["cat", "dog"]
    assert sorted(rows["train"]["label"][:]) == [0] * 10 + [1] * 10

    dataset = LatentDataset(rows["train"], "label", [5, 7])
    pictures = [PIL.Image.open(path) for path in images.rglob("*.png")]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in pictures])
    with torch.no_grad():
        flips = [vae.encode(each).latent_dist.parameters for each in (pixels, pixels.flip(-1))]
    moments = torch.stack(flips, dim=1)
    seen = set()
    for number in range(len(dataset)):
        item = dataset[number]
        assert item["class_labels"] == (5 if rows["train"][number]["label"] == 0 else 7)
        assert item["images"].shape == (3, 4, 4) and item["images"].abs().max() <= 1
        # which picture it is, by its moments
        close = torch.isclose(item["moments"].float(), moments, rtol=2**-10, atol=1e-3).flatten(1).all(dim=1)
        (index,) = close.nonzero().flatten().tolist()
        seen.add(index)
        small = pictures[index].resize((4, 4), PIL.Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(item["images"], expected, rtol=0, atol=0.02)
    assert len(seen) == 20


def test_features_of_both_flips(precompute_latents, latents_arguments, images, teacher, tmp_path):
    options = {"store": "features", "teacher_model_name_or_path": teacher, "grid_size": 2}
    run(precompute_latents, latents_arguments(**options))
    rows = load_latents(tmp_path / "latents", tmp_path / "cache")["validation"]
    assert "image" not in rows.column_names
    encoder = RepresentationTeacher.from_pretrained(teacher, grid_size=2)
    pictures = [PIL.Image.open(path) for path in images.glob("validation/*/*.png")]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in pictures])
    expected = torch.stack([encoder(pixels), encoder(pixels.flip(-1))], dim=1)
    item = LatentDataset(rows, "label", [0, 1])[3]
    assert item["teacher_features"].shape == (2, 4, 16) and "images" not in item
    distances = (item["teacher_features"].float() - expected).abs().amax(dim=(1, 2, 3))
    assert distances.min() < 5e-3 < distances.sort().values[1]


@pytest.mark.parametrize("labels", [[None, 1, 0, None], [None, None, -1, -1]])
def test_latents_without_a_label_are_of_no_class(tmp_path, labels):
    features = datasets.Features(
        {"moments": datasets.Array4D((2, 2, 1, 1), "float16"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    moments = [np.full((2, 2, 1, 1), number, np.float16) for number in range(4)]
    rows = datasets.Dataset.from_dict({"moments": moments, "label": labels}, features)
    dataset = LatentDataset(rows, "label", [5, 7])
    expected = [{None: -1, -1: -1, 0: 5, 1: 7}[label] for label in labels]
    assert [dataset[number]["class_labels"] for number in range(4)] == expected
    reader = LatentReader("label", [5, 7])
    stream = Stream(reader.prepare(rows.to_iterable_dataset()), reader)
    items = {int(item["moments"][0, 0, 0, 0]): item["class_labels"] for item in itertools.islice(stream, 4)}
    assert items == dict(enumerate(expected))


@pytest.mark.parametrize("store", ["image", "features"])
def test_streamed_latents_are_those_of_the_folder(
    precompute_latents, train_rra, latents_arguments, latent_run, teacher, tmp_path, store
):
    """No copy is made of them, and a run takes them."""
    options = {"teacher_model_name_or_path": teacher, "grid_size": 2} if store == "features" else {}
    run(precompute_latents, latents_arguments(store=store, **options))
    expected = LatentDataset(load_latents(tmp_path / "latents", tmp_path / "cache")["train"], "label", [5, 7])
    expected = {checksum(expected[number]["moments"]): expected[number] for number in range(len(expected))}
    reader = LatentReader("label", [5, 7])
    stream = Stream(reader.prepare(load_latents(tmp_path / "latents", streaming=True)["train"]), reader)
    items = {checksum(item["moments"]): item for item in itertools.islice(stream, len(expected))}
    assert items.keys() == expected.keys() and len(items) == 20
    for number, item in expected.items():
        for name, value in item.items():
            torch.testing.assert_close(items[number][name], value, rtol=0, atol=0)
    alignment = {"teacher_model_name_or_path": None} if store == "features" else {}
    run(train_rra, latent_run(streaming=True, max_train_steps=2, cache_dir=tmp_path / "none", **alignment))
    assert len([record for record in read_metrics(tmp_path / "run") if "nll" in record]) == 2
    assert not list((tmp_path / "none").rglob("*.arrow"))


def test_processes_share_the_work_and_threads_keep_the_order(precompute_latents, latents_arguments, tmp_path):
    """Of one file the shards, of several the files; what is written is the same."""
    for number in range(3):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rng = np.random.default_rng(number)
        pictures = [PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(5)]
        rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1, 0]}, features)
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"train-{number}.parquet")
    for source in ("one file", "files"):
        dataset_name = tmp_path / "data" if source == "files" else tmp_path / "data" / "train-0.parquet"
        options = {"train_data_dir": None, "dataset_name": dataset_name, "images_per_shard": 2, "store": "none"}
        whole = tmp_path / source / "whole"
        run(precompute_latents, latents_arguments(**options, output_dir=whole, dataloader_num_workers=1))
        written = {path.name: path.read_bytes() for path in (whole / "train").iterdir()}
        assert len(written) == (4 * 3 if source == "files" else 4)

        args = precompute_latents.parse_args(latents_arguments(**options, output_dir="unused"))
        streams = open_streams(DataSource.from_args(args), "image", "label")
        vae = load_vae(args.vae_model_name_or_path, None)
        settings = describe_latents(
            str(args.dataset_name),
            vae,
            args.vae_model_name_or_path,
            args.vae_subfolder,
            args.resolution,
            args.store,
            args.images_per_shard,
            streams,
        )
        columns = columns_of(settings, streams["train"].features["label"])
        encoder = LatentEncoder(
            settings, vae, None, Accelerator(), "image", "label", args.batch_size, args.dataloader_num_workers
        )
        shares = []
        for process_index in (0, 1):
            folder = tmp_path / source / f"process {process_index}"
            bar = tqdm(disable=True)
            encode_split(streams["train"], folder, columns, encoder, bar, process_index, 2)
            shares.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert shares[0].keys().isdisjoint(shares[1]) and min(map(len, shares)) > 0
        assert shares[0] | shares[1] == written


def test_it_goes_on_where_it_was_and_rebuilds_what_is_half_written(precompute_latents, latents_arguments, tmp_path):
    folder = tmp_path / "latents" / "train"
    run(precompute_latents, latents_arguments())
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "00000-00000.parquet").write_bytes(expected["00000-00000.parquet"][:1000])
    (folder / "00000-00002.parquet").unlink()
    (folder / ".partial-00000-00002.parquet").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not complete: file 0 of the split 'train' is not encoded to its end"):
        load_latents(tmp_path / "latents")
    run(precompute_latents, latents_arguments())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert (folder / "00000-00001.parquet").stat().st_mtime_ns == times["00000-00001.parquet"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_said_and_the_run_goes_on_later(precompute_latents, latents_arguments, tmp_path):
    folder = tmp_path / "latents" / "train"
    run(precompute_latents, latents_arguments())
    expected = names(folder)
    (folder / "00000-00001.parquet").unlink()
    (folder / ".partial-00000-00001.parquet").symlink_to("/dev/full")
    with pytest.raises(OSError, match="There is no room for .*00000-00001.parquet: the disk is full"):
        run(precompute_latents, latents_arguments())
    assert names(folder) == [name for name in expected if name != "00000-00001.parquet"]
    run(precompute_latents, latents_arguments())
    assert names(folder) == expected
    assert len(load_latents(tmp_path / "latents", tmp_path / "cache")["train"]) == 20


def test_what_is_no_image_is_skipped(precompute_latents, latents_arguments, tmp_path, caplog):
    folder = tmp_path / "odd"
    write_images(folder / "train" / "cat", 2, seed=1)
    write_images(folder / "train" / "dog", 1, seed=2)
    PIL.Image.new("L", (20, 9), 200).save(folder / "train" / "cat" / "grey.png")
    (folder / "train" / "cat" / "text.png").write_text("not an image")
    with caplog.at_level("WARNING"):
        run(precompute_latents, latents_arguments(train_data_dir=folder))
    assert caplog.text.count("text.png cannot be read: it is not an image") == 1
    assert len(load_latents(tmp_path / "latents", tmp_path / "cache")["train"]) == 4
    for path in folder.rglob("*.png"):
        path.write_text("not an image")
    with pytest.raises(ValueError, match="None of the images of the split 'train' can be used. The last: .*png"):
        run(precompute_latents, latents_arguments(train_data_dir=folder, output_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# Training from it


def test_draws_are_the_posteriors_and_scaled(tiny_vae):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = tiny_vae.encode(images).latent_dist
    generator = RowGenerator(make_generator(0), 2)
    draws = torch.stack([draw_latents(posterior.parameters, tiny_vae.config, generator) for _ in range(2000)])
    expected_mean, expected_std = (posterior.mean - 0.1) * 0.5, posterior.std * 0.5
    standard_error = expected_std / math.sqrt(2000)
    assert ((draws.mean(dim=0) - expected_mean).abs() < 5 * standard_error).all()
    assert (draws.std(dim=0) / expected_std - 1).abs().max() < 0.1


def test_from_images_to_samples(precompute_latents, train_rra, latents_arguments, latent_run, tiny_vae, tmp_path):
    run(precompute_latents, latents_arguments())
    options = {"patch_size": 1, "position_embedding": "rope", "activation_fn": "swiglu", "random_flip": True}
    run(train_rra, latent_run(**options, max_train_steps=6, validation_steps=3))
    metrics = read_metrics(tmp_path / "run")
    validation_nll = [record["validation_nll"] for record in metrics if "validation_nll" in record]
    assert validation_nll[-1] < validation_nll[0] and "cosine_similarity/block2_layer2" in metrics[1]
    # four 8x8 images a class, enlarged
    assert PIL.Image.open(tmp_path / "run" / "samples" / "step-0000006.png").size == (4 * 64, 2 * 64)

    pipeline = FlowBackPipeline.from_pretrained(tmp_path / "run")
    config = pipeline.transformer.config
    assert (config.in_channels, config.sample_size, config.noise_std, config.num_classes) == (4, 4, 0.2, 2)
    assert hash_weights(pipeline.vae) == hash_weights(tiny_vae)
    assert pipeline(class_labels=["dog"]).images[0].size == (8, 8)
    # an untrained flow is the identity: its nll is that of the latents with their noise, whose variance adds up
    rows = load_latents(tmp_path / "latents", tmp_path / "cache")["validation"].with_format("torch")
    mean, log_variance = rows[:]["moments"][:, 0].float().chunk(2, dim=1)
    second_moment = (0.25 * ((mean - 0.1).square() + log_variance.exp()) + 0.2**2).mean().item()
    expected = 0.5 * (second_moment + math.log(2 * math.pi))
    assert validation_nll[0] == pytest.approx(expected, abs=0.05)


def test_stored_features_train_as_the_teacher_does(
    precompute_latents, train_rra, latents_arguments, latent_run, teacher, tmp_path
):
    options = {"store": "features", "teacher_model_name_or_path": teacher, "grid_size": 2}
    run(precompute_latents, latents_arguments(**options, output_dir=tmp_path / "features"))
    run(precompute_latents, latents_arguments())
    losses = []
    for latents in ("latents", "features"):
        line = latent_run(latents=tmp_path / latents, output_dir=tmp_path / f"run {latents}", random_flip=True)
        run(train_rra, line)
        losses.append([record["loss"] for record in read_metrics(tmp_path / f"run {latents}")[1:5]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    line = latent_run(latents=tmp_path / "features", output_dir=tmp_path / "run", patch_size=4)
    with pytest.raises(ValueError, match="must lie on the flow's grid of 1x1 tokens, but lie on 2x2"):
        run(train_rra, line)
    line = latent_run(latents=tmp_path / "features", teacher_model_name_or_path="another/teacher")
    with pytest.raises(ValueError, match="'another/teacher' is not the teacher whose features are in `--latents`"):
        run(train_rra, line)


def test_mirrored_latents_come_with_what_belongs_to_them(precompute_latents, latents_arguments, vae_dir, tmp_path):
    run(precompute_latents, latents_arguments())
    rows = load_latents(tmp_path / "latents", tmp_path / "cache")
    config = type("Config", (), {"in_channels": 4, "sample_size": 4, "patch_size": 2, "noise_type": "gaussian"})
    settings = json.loads((tmp_path / "latents" / "latents.json").read_text())
    splits = Splits(rows["train"], rows["validation"], ["cat", "dog"], latents=settings)
    source = LatentSource(splits, config, [0, 1], load_vae(vae_dir, None))
    moments = torch.randn(4, 2, 8, 4, 4).half()
    batch = {"moments": moments, "images": torch.randn(4, 3, 8, 8), "class_labels": torch.arange(4)}
    chosen = source.mirror(batch, torch.tensor([True, False, False, True]))
    for number, flip in enumerate((1, 0, 0, 1)):
        assert torch.equal(chosen["moments"][number], moments[number, flip])
        image = batch["images"][number]
        assert torch.equal(chosen["images"][number], image.flip(-1) if flip else image)


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resolution": 7}, "`--resolution` must be a multiple of the VAE's factor 2, but is 7"),
        ({"vae_model_name_or_path": "./nowhere"}, "`--vae_model_name_or_path` './nowhere' cannot be loaded"),
        ({"train_data_dir": "nowhere"}, "`--train_data_dir` must be an existing folder, but is 'nowhere'"),
        ({"label_column": "kind"}, r"`--label_column` must be a column of the data set, .*'label'\], but is 'kind'"),
        ({"image_column": "photo"}, r"`--image_column` must be a column of the data set, .* but is 'photo'"),
    ],
)
def test_bad_arguments_raise_and_leave_nothing(precompute_latents, latents_arguments, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(precompute_latents, latents_arguments(**options))
    assert not (tmp_path / "latents").exists()


def test_labels_without_names_are_refused(precompute_latents, latents_arguments, tmp_path):
    rows = {"image": [PIL.Image.new("RGB", (8, 8))] * 2, "label": ["ant", "bee"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="`--label_column` 'label' must hold class labels with names"):
        run(precompute_latents, latents_arguments(train_data_dir=None, dataset_name=tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    "line, message",
    [
        (["--output_dir", "x"], "give one of --dataset_name and --train_data_dir"),
        (["--output_dir", "x", "--train_data_dir", "y", "--store", "features"], "--grid_size belongs to --store"),
        (["--output_dir", "x", "--train_data_dir", "y", "--grid_size", "2"], "--grid_size belongs to --store"),
        (
            ["--output_dir", "x", "--train_data_dir", "y", "--batch_size", "0"],
            "argument --batch_size: must be a whole number of at least 1",
        ),
    ],
)
def test_the_parser_refuses(precompute_latents, capsys, line, message):
    with pytest.raises(SystemExit):
        precompute_latents.parse_args(line)
    assert message in capsys.readouterr().err


def test_a_folder_of_other_latents_is_refused(precompute_latents, latents_arguments, tmp_path):
    run(precompute_latents, latents_arguments())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.joinpath("latents").rglob("*")}
    with pytest.raises(ValueError, match=r"holds other latents; .*image_size \(8 then, 4 now\)"):
        run(precompute_latents, latents_arguments(image_size=4))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.joinpath("latents").rglob("*")} == before
    with pytest.raises(ValueError, match="must be empty or hold latents, but holds something else"):
        run(precompute_latents, latents_arguments(output_dir=tmp_path / "vae"))


def test_what_does_not_fit_the_latents_is_refused(
    precompute_latents, train_rra, latents_arguments, latent_run, tiny_vae, vae_dir, tmp_path
):
    run(precompute_latents, latents_arguments(store="none"))
    tiny_vae.decoder.conv_out.bias.data.add_(1.0)
    tiny_vae.save_pretrained(tmp_path / "other_vae")
    cases = [
        (
            {"vae_model_name_or_path": tmp_path / "other_vae", "alignment": "none"},
            "were made with another VAE .* than",
        ),
        ({"resolution": 8, "alignment": "none"}, "4 channels of 4x4, but takes 4 of 8x8"),
        ({"in_channels": 3, "alignment": "none"}, "4 channels of 4x4, but takes 3 of 4x4"),
        ({"noise_type": "uniform", "alignment": "none"}, "`--noise_type` must be gaussian for latents"),
        ({}, "were stored without images and features: give --alignment none"),
        (
            {"latents": tmp_path / "vae"},
            "must be a folder of training/precompute_latents.py, but .*has no latents.json",
        ),
        ({"label_column": "kind", "alignment": "none"}, "`--label_column` must be a column of the data set"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            run(train_rra, latent_run(**options))
    # the folder is remembered with its VAE, whose weights were changed in the meantime
    tiny_vae.save_pretrained(vae_dir)
    with pytest.raises(ValueError, match="were made with another VAE"):
        run(train_rra, latent_run(alignment="none"))
    assert not (tmp_path / "run").exists()


def test_latents_stand_instead_of_a_data_set(train_rra, capsys):
    common = ["--output_dir", "x", "--latents", "y"]
    for more, message in [
        (["--train_data_dir", "z"], "give one of --dataset_name, --train_data_dir and --latents"),
        (["--teacher_features", "z"], "--latents hold their own features: leave --teacher_features out"),
    ]:
        with pytest.raises(SystemExit):
            train_rra.parse_args(common + more)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_rra.parse_args(["--output_dir", "x", "--train_data_dir", "y", "--vae_model_name_or_path", "z"])
    assert "--vae_model_name_or_path and --vae_subfolder belong to --latents" in capsys.readouterr().err
