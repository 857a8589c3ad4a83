import json
import math
import shutil
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.data import make_generator
from flowback_hf.evaluation import EvaluationArguments, evaluate
from flowback_hf.hub import load_pipeline
from flowback_hf.metrics import FrechetDistance, ImageFeatureExtractor, ReferenceFeatures
from flowback_hf_cli.evaluation import parse_args

from ..conftest import REPOSITORY, command_line, start_two_processes
from .conftest import CLASS_NAMES, write_images


@pytest.fixture
def options(model_folder, image_folder, judge, tmp_path):
    return {
        "model": model_folder,
        "data_dir": image_folder,
        "cache_dir": tmp_path / "cache",
        "features": judge,
        "num_samples": 19,
        "guidance_scales": [1.0, 2.0],
        "batch_size": 7,
    }


def run(**options):
    line = command_line(**options)
    args = parse_args(line)
    evaluate(load_pipeline(FlowBackPipeline, args.model), EvaluationArguments(**vars(args)), line)


def read_results(folder):
    return json.loads((folder / "evaluation.json").read_text())


def without_times(results):
    timed = ("images_per_second", "command")
    return {name: value for name, value in results.items() if not name.startswith(timed)}


@pytest.fixture
def load_labelled(image_folder):
    """Images and class numbers of a split, in the order of the folder."""

    def load(split):
        files = sorted((image_folder / split).rglob("*.png"))
        return [PIL.Image.open(file) for file in files], [CLASS_NAMES.index(file.parent.name) for file in files]

    return load


# Whole evaluations


def test_everything_is_measured_and_reported(script, options, tmp_path, load_labelled, judge, model_folder, capsys):
    output_dir = tmp_path / "evaluation"
    line = command_line(output_dir=output_dir, linear_probe=True, **options)
    script("evaluate_flow").main(parse_args(line), line)
    results = read_results(output_dir)
    assert all(isinstance(value, int | float | str) for value in results.values())  # flat
    assert {
        "model": f"{model_folder.parent.name}/flow",
        "dataset": "insects",
        "split": "validation",
        "num_images": 12,
        "num_reference_images": 36,
        "num_probe_images": 36,
        "num_samples": 19,
        "reference": "insects, train",
        "features": results["features"],
    }.items() <= results.items()
    assert results["features"].endswith("/judge")
    for method in ("gradient", "ascent", "bayes", "shortlist"):
        assert 0 <= results[f"accuracy/{method}"] <= 1 and results[f"images_per_second/{method}"] > 0
    assert results["agreement_with_bayes/bayes"] == results["agreement_with_bayes/shortlist"] == 1.0
    assert results["best_frechet_distance"] == min(results[f"frechet_distance/guidance_{s}"] for s in ("1.0", "2.0"))
    assert results[f"frechet_distance/guidance_{results['best_guidance_scale']}"] == results["best_frechet_distance"]
    probed = [name.removeprefix("linear_probe/") for name in results if name.startswith("linear_probe/")]
    assert probed == ["block1_layer1", "block2_layer1", "block2_layer2", "block3_layer1"]
    assert results["linear_probe_best"] == max(results[f"linear_probe/{place}"] for place in probed)

    # what a few of these numbers are, computed from the parts of the package
    images, labels = load_labelled("validation")
    classifier = FlowBackClassificationPipeline.from_pretrained(model_folder)
    for name, class_labels in {"nll": labels, "nll_no_class": None}.items():
        likelihood = classifier.log_prob(images, class_labels, generator=make_generator(0)).mean().item()
        assert results[name] == pytest.approx(-likelihood / 48, rel=1e-4)
    scores = classifier.class_scores(images, "bayes", generator=make_generator(0))
    accuracy = (scores.argmax(dim=1) == torch.tensor(labels)).double().mean()
    assert results["accuracy/bayes"] == pytest.approx(accuracy)
    extractor = ImageFeatureExtractor.from_pretrained(judge)
    reference = ReferenceFeatures.from_batches([extractor(load_labelled("train")[0]).features], "r", extractor.name)
    samples = [PIL.Image.open(path) for path in sorted((output_dir / "samples" / "guidance_2.0").glob("*.png"))]
    features = extractor(samples)
    distance = FrechetDistance(reference).compute(predictions=features.features)["frechet_distance"]
    assert results["frechet_distance/guidance_2.0"] == pytest.approx(distance, rel=1e-3)
    read = [extractor.id2label[label] for label in features.logits.argmax(dim=1).tolist()]
    wanted = [CLASS_NAMES[number % 3] for number in range(19)]
    share = sum(name == other for name, other in zip(read, wanted)) / 19
    assert results["classifier_reads_label/guidance_2.0"] == pytest.approx(share)

    report = (output_dir / "evaluation.md").read_text()
    assert report in capsys.readouterr().out
    for line in (
        "| method | accuracy | agrees with Bayes | images/s |",
        "The shortlist holds all 3 classes: it is Bayes' rule.",
        "| guidance scale | Fréchet distance | kernel distance | Inception Score | precision | recall |",
        "19 samples at each scale, against 36 images of insects, train, in the features of",
        f"`python pipelines/evaluate_flow.py --output_dir {output_dir}",
    ):
        assert line in report, line
    for name in ("guidance_curve.png", "samples.png", "linear_probe.png"):
        picture = np.asarray(PIL.Image.open(output_dir / name).convert("L"))
        assert name in report and picture.std() > 10
    assert not list((output_dir / "parts").rglob("*.npz"))


def test_accuracy_is_of_the_labels_by_name(options, tmp_path, load_labelled, model_folder):
    """Clean images, so that the figure can be computed again exactly; the label of a folder is its name."""
    options = {**options, "features": None, "num_noise_draws": 0, "methods": ["bayes", "gradient"]}
    run(output_dir=tmp_path / "evaluation", **options)
    results = read_results(tmp_path / "evaluation")
    images, labels = load_labelled("validation")
    classifier = FlowBackClassificationPipeline.from_pretrained(model_folder)
    for method in ("bayes", "gradient"):
        predicted = classifier.class_scores(images, method, num_noise_draws=0).argmax(dim=1)
        assert results[f"accuracy/{method}"] == pytest.approx((predicted == torch.tensor(labels)).double().mean())
    assert "accuracy/ascent" not in results and "best_guidance_scale" not in results
    assert not (tmp_path / "evaluation" / "guidance_curve.png").exists()


def test_two_processes_give_what_one_gives_and_a_run_goes_on(options, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    line = command_line(output_dir=two, linear_probe=True, **options)
    script_file = REPOSITORY / "pipelines" / "evaluate_flow.py"
    process = start_two_processes(script_file, line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    # one process, in two goes: the second adds a guidance scale and the probe, and redoes nothing
    run(output_dir=one, **{**options, "guidance_scales": [1.0]})
    made = {path: path.stat().st_mtime_ns for path in (one / "samples" / "guidance_1.0").iterdir()}
    likelihood = (one / "parts" / "likelihood" / "results.json").stat().st_mtime_ns
    run(output_dir=one, linear_probe=True, **options)
    assert {path: path.stat().st_mtime_ns for path in (one / "samples" / "guidance_1.0").iterdir()} == made
    assert (one / "parts" / "likelihood" / "results.json").stat().st_mtime_ns == likelihood

    expected, actual = without_times(read_results(one)), without_times(read_results(two))
    assert actual == {
        name: value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5)
        for name, value in expected.items()
    }


@pytest.mark.parametrize("component, calls", [("class_scores", 1), ("sample", 2), ("features", 7)])
def test_an_interrupted_evaluation_goes_on_where_it_was(options, tmp_path, monkeypatch, component, calls):
    options = {**options, "guidance_scales": [1.0], "methods": ["gradient"], "num_noise_draws": 0}
    owner, name = {
        "class_scores": (FlowBackClassificationPipeline, "class_scores"),
        "sample": (FlowBackPipeline, "__call__"),
        "features": (ImageFeatureExtractor, "forward"),
    }[component]
    original, seen, interrupted_at = getattr(owner, name), [], calls + 1

    def count(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == interrupted_at:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    with pytest.raises(KeyboardInterrupt):
        run(output_dir=tmp_path / "interrupted", **options)
    assert not (tmp_path / "interrupted" / "evaluation.json").exists()
    run(output_dir=tmp_path / "interrupted", **options)
    calls_of_two_goes, seen[:], interrupted_at = len(seen), [], None
    run(output_dir=tmp_path / "whole", **options)
    assert calls_of_two_goes == len(seen) + 1  # the call that was interrupted
    expected = without_times(read_results(tmp_path / "whole"))
    assert without_times(read_results(tmp_path / "interrupted")) == expected


def test_a_density_model_without_classes(unconditional_folder, options, tmp_path, load_labelled):
    options = {**options, "model": unconditional_folder, "guidance_scales": [1.0]}
    run(output_dir=tmp_path / "evaluation", num_noise_draws=3, **options)
    results = read_results(tmp_path / "evaluation")
    # each of the three draws has noise of its own; uniform noise is small, so the tolerance is too
    classifier = FlowBackClassificationPipeline.from_pretrained(unconditional_folder)
    images, generator = load_labelled("validation")[0], make_generator(0)
    draws = torch.stack([classifier.log_prob(images, generator=generator) for _ in range(3)])
    assert draws.std(dim=0).min() > 0
    nll = -draws.double().mean(dim=0) / 48
    assert results["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert results["nll_standard_error"] == pytest.approx(nll.std().item() / math.sqrt(12), rel=1e-3)
    assert results["bits_per_dim"] == pytest.approx((results["nll"] + math.log(128)) / math.log(2))
    assert results["bits_per_dim_standard_error"] == pytest.approx(results["nll_standard_error"] / math.log(2))
    assert not any(name.startswith(("accuracy", "classifier_reads_label")) for name in results)
    assert "bits per dimension" in (tmp_path / "evaluation" / "evaluation.md").read_text()
    with pytest.raises(ValueError, match="`--linear_probe` needs classes, but this flow is unconditional"):
        run(output_dir=tmp_path / "probe", linear_probe=True, **options)
    with pytest.raises(ValueError, match="guides itself: give --guidance_temperature, or --guidance_scales 1.0"):
        run(output_dir=tmp_path / "guided", **{**options, "guidance_scales": [1.0, 2.0]})


def test_a_latent_flow(randomised_model, options, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.5,
    )
    flow = randomised_model(num_classes=3, in_channels=4, noise_std=0.2).float()
    model = tmp_path / "latent"
    FlowBackPipeline(flow, vae=vae, id2label=dict(enumerate(CLASS_NAMES))).save_pretrained(model)
    options = {**options, "model": model, "guidance_scales": [1.0], "methods": ["gradient"]}
    run(output_dir=tmp_path / "evaluation", linear_probe=True, **options)
    results = read_results(tmp_path / "evaluation")
    assert results["num_images_resized"] == 12  # 4x4 to the VAE's 8x8
    assert "bits_per_dim" not in results and math.isfinite(results["nll"])
    (first, *_) = sorted((tmp_path / "evaluation" / "samples" / "guidance_1.0").iterdir())
    assert PIL.Image.open(first).size == (8, 8)
    assert "linear_probe/block3_layer1" in results and "frechet_distance/guidance_1.0" in results


def test_the_best_guidance_is_written_where_it_is_asked_for(model_folder, options, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    options = {**options, "model": model, "guidance_rule": "product", "methods": ["gradient"]}
    run(output_dir=tmp_path / "evaluation", **options)
    assert FlowBackPipeline.from_pretrained(model).config.guidance_scale == 1.5
    run(output_dir=tmp_path / "evaluation", write_best_guidance=True, **options)
    config = FlowBackPipeline.from_pretrained(model).config
    assert config.guidance_scale == read_results(tmp_path / "evaluation")["best_guidance_scale"]
    assert config.guidance_rule == "product"


def test_the_guidance_schedule_is_the_pipelines(model_folder, options, tmp_path):
    options = {**options, "guidance_scales": [3.0], "methods": [], "num_samples": 5}
    run(output_dir=tmp_path, guidance_schedule="linear", **options)
    pipeline = FlowBackPipeline.from_pretrained(model_folder)
    pixels = np.asarray(PIL.Image.open(tmp_path / "samples" / "guidance_3.0" / "000001.png")).astype(int)

    def distance(schedule):
        image = pipeline(class_labels=[1], guidance_scale=3.0, guidance_schedule=schedule,
                         generator=make_generator(0, 1)).images[0]  # fmt: skip
        return np.abs(np.asarray(image) - pixels).max()

    assert distance("linear") <= 1 < distance("constant")
    assert read_results(tmp_path)["guidance_schedule"] == "linear"


def test_a_saved_reference_is_used_again(options, tmp_path):
    run(output_dir=tmp_path / "first", **options)
    reference = tmp_path / "first" / "reference.npz"
    run(output_dir=tmp_path / "second", reference=reference, **options)
    first, second = (without_times(read_results(tmp_path / name)) for name in ("first", "second"))
    assert second == first
    assert not (tmp_path / "second" / "reference.npz").exists()


def test_an_encoder_has_no_inception_score(options, tmp_path):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    encoder = tmp_path / "encoder"
    Dinov2Model(Dinov2Config(hidden_size=4, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(encoder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(encoder)
    options = {**options, "features": encoder, "methods": ["gradient"]}
    run(output_dir=tmp_path / "evaluation", **options)
    results = read_results(tmp_path / "evaluation")
    assert "recall/guidance_1.0" in results and "inception_score/guidance_1.0" not in results
    assert "Inception" not in (tmp_path / "evaluation" / "evaluation.md").read_text()


# Data


def test_odd_images(options, tmp_path, capsys):
    folder = tmp_path / "odd"
    for name in CLASS_NAMES:
        write_images(folder / "validation" / name, 2, seed=1)
        write_images(folder / "train" / name, 2, seed=1)
    whole = (folder / "validation" / "ant" / "0.png").read_bytes()
    (folder / "validation" / "ant" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "validation" / "ant" / "text.png").write_text("not an image")
    PIL.Image.new("CMYK", (8, 6)).save(folder / "validation" / "bee" / "large.jpg")
    options = {**options, "data_dir": folder, "features": None}
    run(output_dir=tmp_path / "evaluation", **options)
    results = read_results(tmp_path / "evaluation")
    assert [results[f"num_images{kind}"] for kind in ("", "_skipped", "_resized")] == [7, 2, 1]
    printed = capsys.readouterr().out
    assert "2 images cannot be used and were skipped" in printed
    assert "truncated.png" in printed and "text.png" in printed
    assert "1 images were resized and center-cropped to 4x4" in printed
    with pytest.raises(ValueError, match="large.jpg has 8x6 pixels, but the flow's images have 4x4"):
        run(output_dir=tmp_path / "strict", strict=True, **options)


def save_parquet(path, labels, feature):
    rows = {"image": [PIL.Image.new("RGB", (4, 4), (60 * n, 0, 0)) for n in range(len(labels))], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    path.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path / "validation.parquet")


# Bad input


@pytest.mark.parametrize(
    "labels, feature, message",
    [
        ([0, 1], datasets.ClassLabel(names=["dog", "ant"]), r"classes \['dog'\] are not among this flow's, which are"),
        (["bee", None], datasets.Value("string"), "column 'label' has rows without a label"),
        ([0, 3], datasets.Value("int64"), "labels must be numbers from 0 to 2, as the flow's are"),
        ([0.5, 1.0], datasets.Value("float64"), "labels must be numbers from 0 to 2, as the flow's are"),
    ],
)
def test_labels_that_do_not_match_the_flows_raise(options, tmp_path, labels, feature, message):
    save_parquet(tmp_path / "rows", labels, feature)
    options = {**options, "data_dir": None, "dataset_name": tmp_path / "rows"}
    with pytest.raises(ValueError, match=message):
        run(output_dir=tmp_path / "evaluation", **options)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"data_dir": "nowhere"}, "`--data_dir` must be an existing folder, but is 'nowhere'"),
        ({"split": "test"}, r"no split 'test', but \['train', 'validation'\]"),
        ({"reference_split": "extra"}, r"no split 'extra', but \['train', 'validation'\]"),
        ({"image_column": "photo"}, "`--image_column` must be a column .* but is 'photo'"),
        ({"label_column": "kind"}, "`--label_column` must be a column .* but is 'kind'"),
        ({"features": "./nowhere"}, "`--features` './nowhere' cannot be loaded"),
        ({"reference": "nowhere.npz"}, "'nowhere.npz' is not a reference saved by flowback_hf"),
    ],
)
def test_bad_arguments_leave_nothing(options, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        run(output_dir=tmp_path / "evaluation", **{**options, **changed})
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("module", ["torchmetrics", "matplotlib", "sklearn"])
def test_a_missing_extra_is_named_before_any_work(options, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'This evaluation needs {module}: pip install "flowback_hf\[eval\]"'):
        run(output_dir=tmp_path / "evaluation", linear_probe=True, **options)
    assert not (tmp_path / "evaluation").exists()


def test_a_reference_of_other_features_is_refused(options, tmp_path):
    features = torch.randn(9, 4)
    ReferenceFeatures.from_batches([features], "insects", "dinov2").save(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match="holds features of 'dinov2', but the samples' are of '.*judge'"):
        run(output_dir=tmp_path / "evaluation", reference=tmp_path / "reference.npz", **options)
    assert not (tmp_path / "evaluation").exists()


def test_an_empty_folder_and_one_of_broken_images(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="'.*empty' holds no images that can be loaded"):
        run(output_dir=tmp_path / "evaluation", **{**options, "data_dir": tmp_path / "empty"})
    for split in ("train", "validation"):
        for name in CLASS_NAMES:
            (tmp_path / "broken" / split / name).mkdir(parents=True)
            (tmp_path / "broken" / split / name / "0.png").write_text("not an image")
    with pytest.raises(ValueError, match="at least 2 images, but 0 of the 3 of the split 'validation' can be used"):
        run(output_dir=tmp_path / "evaluation", **{**options, "data_dir": tmp_path / "broken"})
    assert not (tmp_path / "evaluation").exists()


def test_another_evaluations_folder_is_refused(options, tmp_path):
    options["methods"] = ["gradient"]
    run(output_dir=tmp_path / "evaluation", **options)
    before = (tmp_path / "evaluation" / "evaluation.json").read_text()
    with pytest.raises(ValueError, match=r"other settings: seed \(0 then, 1 now\)"):
        run(output_dir=tmp_path / "evaluation", seed=1, **options)
    with pytest.raises(ValueError, match=r"samples_guidance_1.0 holds .*: num_samples \(19 then, 21 now\)"):
        run(output_dir=tmp_path / "evaluation", **{**options, "num_samples": 21})
    assert (tmp_path / "evaluation" / "evaluation.json").read_text() == before
    # by name or by default, the schedule is the same
    run(output_dir=tmp_path / "evaluation", guidance_schedule="constant", **options)


def test_results_of_other_weights_in_the_same_folder_are_refused(options, tmp_path):
    folder = shutil.copytree(options["model"], tmp_path / "model")
    options |= {"methods": ["gradient"], "model": folder, "output_dir": tmp_path / "evaluation"}
    run(**options)
    pipeline = FlowBackPipeline.from_pretrained(folder)
    pipeline.transformer.blocks[0].proj_out.bias.data.add_(1.0)
    pipeline.save_pretrained(folder)
    message = r"likelihood holds what was made with other settings: model_hash \(.*\). Name .* delete .*parts and "
    with pytest.raises(ValueError, match=message):
        run(**options)

    # not all of it deleted: the samples would be those of the other weights
    output_dir = tmp_path / "evaluation"
    earlier = json.loads((output_dir / "evaluation.json").read_text())["frechet_distance/guidance_1.0"]
    shutil.rmtree(output_dir / "parts")
    with pytest.raises(ValueError, match="guidance_1.0 holds images, but .*guidance_1.0, which says .* is missing"):
        run(**options)
    for folder in output_dir.glob("samples/guidance_*"):
        shutil.rmtree(folder)
    run(**options)
    assert json.loads((output_dir / "evaluation.json").read_text())["frechet_distance/guidance_1.0"] != earlier


@pytest.mark.parametrize(
    "line, message",
    [
        ([], "give one of --dataset_name and --data_dir"),
        (
            ["--data_dir", "d", "--num_samples", "3"],
            "argument --num_samples: must be a whole number of at least 4, but is 3",
        ),
        (
            ["--data_dir", "d", "--guidance_scales", "0.5"],
            "argument --guidance_scales: must be a finite number of at least 1",
        ),
        (["--data_dir", "d", "--write_best_guidance"], "--write_best_guidance needs --features"),
        (["--data_dir", "d", "--features", "f", "--write_best_guidance"], "needs a --model folder to write to"),
        (
            ["--data_dir", "d", "--features", "f", "--write_best_guidance", "--guidance_schedule", "linear"],
            "--write_best_guidance is for the constant --guidance_schedule",
        ),
        (
            ["--data_dir", "d", "--features", "f", "--write_best_guidance", "--guidance_temperature", "2"],
            "--write_best_guidance is for --guidance_temperature 1.0",
        ),
        (["--data_dir", "d", "--methods", "guess"], "invalid choice: 'guess'"),
    ],
)
def test_the_parser_refuses(capsys, line, message):
    with pytest.raises(SystemExit):
        parse_args(["--model", "m", "--output_dir", "o", *line])
    assert message in capsys.readouterr().err
