import math
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from flowback_hf.metrics import (
    Accuracy,
    BitsPerDim,
    FrechetDistance,
    ImageFeatureExtractor,
    InceptionFeatureExtractor,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    ReferenceFeatures,
    linear_probe,
    load_feature_extractor,
    pooled_hidden_states,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics_cache"))


def random_features(num_images, feature_dim=6, seed=0, mean=0.0):
    """Correlated, of unequal scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(feature_dim, feature_dim, generator=generator)
    return torch.randn(num_images, feature_dim, generator=generator) @ mixing + mean


def reference_of(features, **names):
    names = {"name": "real", "feature_name": "random", **names}
    return ReferenceFeatures.from_batches([features], **names)


# Accuracy and bits


def test_accuracy_in_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[[3, 1, 0, 2, 4], [1, 3, 0, 2, 4]], references=[3, 3])
    metric.add_batch(predictions=[[1, 3, 0, 2, 4], [0, 1, 2, 3, 5]], references=[1, 7])
    assert metric.compute() == {"accuracy": 0.5, "top5_accuracy": 0.75, "num_images": 4}


def test_accuracy_has_no_top5_of_less_than_five():
    assert Accuracy().compute(predictions=[[1, 0], [0, 1]], references=[1, 1]) == {"accuracy": 0.5, "num_images": 2}


def test_bits_per_dim_and_its_standard_error():
    log_prob = np.array([[-10.0, -14.0], [-20.0, -16.0], [-33.0, -33.0]])
    bits = (np.array([12.0, 18.0, 33.0]) / 4 + math.log(128)) / math.log(2)
    results = BitsPerDim().compute(predictions=log_prob, num_dimensions=4)
    assert results["bits_per_dim"] == pytest.approx(bits.mean(), abs=1e-12)
    assert results["standard_error"] == pytest.approx(bits.std(ddof=1) / 3**0.5, abs=1e-12)
    assert (results["num_images"], results["num_draws"]) == (3, 2)


def test_bits_per_dim_of_one_image_has_no_standard_error():
    assert math.isnan(BitsPerDim().compute(predictions=[[-1.0]], num_dimensions=4)["standard_error"])


# Fréchet distance


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), feature_dim=st.integers(1, 12), num_images=st.integers(40, 80))
def test_frechet_distance_is_that_of_scipys_sqrtm(seed, feature_dim, num_images):
    real = random_features(64, feature_dim, seed=seed, mean=1.0)
    generated = random_features(num_images, feature_dim, seed=seed + 1)
    moments = [
        (features.double().numpy().mean(0), np.atleast_2d(np.cov(features.double().numpy(), rowvar=False)))
        for features in (generated, real)
    ]
    (mean_1, covariance_1), (mean_2, covariance_2) = moments
    root = scipy.linalg.sqrtm(covariance_1 @ covariance_2)
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1 + covariance_2 - 2 * root.real)
    actual = FrechetDistance(reference_of(real)).compute(predictions=generated)["frechet_distance"]
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_distance_of_a_set_to_itself_is_zero():
    features = random_features(50)
    distance = FrechetDistance(reference_of(features)).compute(predictions=features)["frechet_distance"]
    assert abs(distance) < 1e-6


@pytest.mark.parametrize("metric_class", [FrechetDistance, KernelDistance, PrecisionRecall, InceptionScore])
def test_merged_shards_equal_one_pass(metric_class):
    reference, generated = reference_of(random_features(60, seed=1)), random_features(50)
    argument = "random" if metric_class is InceptionScore else reference
    whole = metric_class(argument).compute(predictions=generated)
    shards = [metric_class(argument) for _ in range(3)]  # the third is never given anything
    shards[0].add_batch(predictions=generated[:20])
    shards[1].add_batch(predictions=generated[20:45])
    for features in generated[45:]:
        shards[1].add(prediction=features)
    shards[0].merge(shards[2])
    shards[0].merge(shards[1])
    merged = shards[0].compute()
    assert merged == {name: pytest.approx(value) for name, value in whole.items()}
    assert merged["num_images"] == 50

    empty = metric_class(argument)
    shards[1].add_batch(predictions=generated[:20])
    empty.merge(shards[1])
    assert empty.compute()["num_images"] == 50


def test_a_report_says_which_features_how_many_images_which_reference():
    real, generated = random_features(30, seed=1), random_features(20)
    reference = reference_of(real, name="digits, train", feature_name="judge")
    for metric in (FrechetDistance(reference), KernelDistance(reference), PrecisionRecall(reference)):
        results = metric.compute(predictions=generated)
        said = {name: results[name] for name in ("num_images", "features", "reference", "num_reference_images")}
        expected = {"num_images": 20, "features": "judge", "reference": "digits, train", "num_reference_images": 30}
        assert said == expected
        assert all(isinstance(value, int | float | str) for value in results.values())
    score = InceptionScore("judge").compute(predictions=generated)
    assert (score["num_images"], score["features"]) == (20, "judge")


@pytest.mark.parametrize("num_real, num_generated, warned", [(7, 50, False), (6, 50, True), (50, 6, True)])
def test_fewer_images_than_features_are_warned_about(num_real, num_generated, warned):
    metric = FrechetDistance(reference_of(random_features(num_real)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric.compute(predictions=random_features(num_generated, seed=1))
    messages = [str(warning.message) for warning in caught if "needs more than 6 images on each side" in str(warning)]
    assert len(messages) == warned
    if warned:
        assert f"has {num_generated} generated and {num_real} real ones" in messages[0]


def test_metrics_leave_the_global_generator_alone_and_do_not_depend_on_it():
    reference, generated = reference_of(random_features(60, seed=1)), random_features(50)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = KernelDistance(reference).compute(predictions=generated)
    assert torch.equal(torch.rand(1), expected)
    assert KernelDistance(reference).compute(predictions=generated) == first


# Kernel distance, Inception Score


def test_kernel_distance_is_the_unbiased_estimate():
    real, generated = random_features(12, seed=1).double(), random_features(12).double()

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    within = [(kernel(x, x).sum() - kernel(x, x).trace()) / (12 * 11) for x in (real, generated)]
    expected = sum(within) - 2 * kernel(real, generated).mean()
    results = KernelDistance(reference_of(real)).compute(predictions=generated)
    assert results["kernel_distance"] == pytest.approx(expected.item(), rel=1e-5)
    assert results["kernel_distance_std"] == pytest.approx(0, abs=1e-6)  # all subsets are the whole


def test_inception_score_of_sure_and_of_clueless_predictions():
    sure = torch.eye(4).repeat(250, 1) * 1000
    results = InceptionScore("oracle").compute(predictions=sure)
    assert 3.9 < results["inception_score"] <= 4
    assert InceptionScore("oracle").compute(predictions=0 * sure)["inception_score"] == pytest.approx(1)
    for num_images in (4, 8, 16):  # ten splits of so few would say nothing
        few = InceptionScore("oracle").compute(predictions=sure[:num_images])
        assert few["inception_score"] == pytest.approx(4) and few["inception_score_std"] == 0.0


def test_the_random_numbers_of_every_device_stay_what_they_were(monkeypatch):
    def refuse(seed):
        raise AssertionError("reseeds all GPUs")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    expected = torch.get_rng_state()
    first, again = (InceptionScore("oracle").compute(predictions=torch.arange(60.0).view(20, 3).sin()) for _ in "ab")
    assert first == again and torch.equal(torch.get_rng_state(), expected)


# Precision and recall


def test_precision_and_recall_by_hand():
    """On a line, first neighbours. Real 0, 1, 3 have radii 1, 1, 2 and cover [-1, 5]; generated 4, 4.5, 10 have radii
    0.5, 0.5, 5.5 and cover [3.5, 5] and [4.5, 15.5]."""
    real = torch.tensor([[0.0], [1.0], [3.0]])
    generated = torch.tensor([[4.0], [4.5], [10.0]])
    results = PrecisionRecall(reference_of(real), num_neighbors=1).compute(predictions=generated)
    assert results["precision"] == pytest.approx(2 / 3)
    assert results["recall"] == 0.0
    on_the_border = torch.tensor([[5.0], [-1.0], [5.001]])
    metric = PrecisionRecall(reference_of(real), num_neighbors=1)
    assert metric.compute(predictions=on_the_border)["precision"] == pytest.approx(2 / 3)
    swapped = PrecisionRecall(reference_of(generated), num_neighbors=1).compute(predictions=real)
    assert (swapped["precision"], swapped["recall"]) == (0.0, pytest.approx(2 / 3))


def test_a_copy_of_the_images_has_full_precision_and_recall_and_one_mode_has_not():
    real = torch.cat([random_features(40, 2), random_features(40, 2, seed=1, mean=1000.0)])
    copied = PrecisionRecall(reference_of(real)).compute(predictions=real)
    assert (copied["precision"], copied["recall"]) == (1.0, 1.0)
    one_mode = PrecisionRecall(reference_of(real)).compute(predictions=real[:40])
    assert one_mode["precision"] == 1.0 and one_mode["recall"] == pytest.approx(0.5)


def test_chunks_do_not_matter():
    metric = PrecisionRecall(reference_of(random_features(30, seed=1)))
    points, centers = random_features(25), random_features(30, seed=1)
    whole = metric._share_within(points, centers)
    assert 0 < whole < 1 and metric._share_within(points, centers, chunk_size=7) == whole


# References


def test_a_reference_in_batches_saved_and_loaded(tmp_path):
    features = random_features(50)
    whole = reference_of(features)
    parts = ReferenceFeatures.from_batches(features.split(9), "real", "random", max_kept=20)
    parts.save(tmp_path / "reference.npz")
    loaded = ReferenceFeatures.load(tmp_path / "reference.npz", "random")
    assert (loaded.name, loaded.feature_name, loaded.num_images) == ("real", "random", 50)
    np.testing.assert_allclose(loaded.mean, whole.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(loaded.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-10)
    np.testing.assert_array_equal(loaded.features, features[:20].numpy())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["reference.npz"]
    # other tools read the moments by these names
    with np.load(tmp_path / "reference.npz") as file:
        assert {"mu", "sigma"} <= set(file.files)


def test_a_reference_of_other_features_is_refused(tmp_path):
    reference_of(random_features(20)).save(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match="holds features of 'random', but the samples' are of 'dinov2'"):
        ReferenceFeatures.load(tmp_path / "reference.npz", "dinov2")


@pytest.mark.parametrize("kind", ["missing", "text", "other", "truncated"])
def test_a_file_that_is_no_reference_is_refused(tmp_path, kind):
    path = tmp_path / "reference.npz"
    if kind == "text":
        path.write_text("no reference")
    elif kind == "other":
        np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    elif kind == "truncated":
        reference_of(random_features(20)).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="reference.npz' is not a reference saved by flowback_hf"):
        ReferenceFeatures.load(path, "random")


# Feature extractors


def colours(num_images, size=(32, 32), mode="RGB"):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (num_images, *size, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(array).convert(mode) for array in arrays]


def test_features_of_an_encoder_from_a_folder(tmp_path):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(image_size=28, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    folder = tmp_path / "demo" / "teacher"
    model.save_pretrained(folder)
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    extractor = load_feature_extractor(str(folder))
    assert isinstance(extractor, ImageFeatureExtractor) and extractor.name == "demo/teacher"
    assert extractor.id2label is None and not extractor.train().model.training
    images = colours(3)
    output = extractor(images)
    with torch.no_grad():
        expected = model(pixel_values=processor(images, return_tensors="pt").pixel_values).last_hidden_state[:, 0]
    assert output.logits is None
    torch.testing.assert_close(output.features, expected)


def test_features_and_logits_of_a_classifier():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4)
    model = ResNetForImageClassification(config).eval()
    processor = BitImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    extractor = ImageFeatureExtractor(model, processor, name="judge")
    images = colours(3, size=(8, 8), mode="L")
    output = extractor(images)
    pixel_values = processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixel_values=pixel_values, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.features, expected.hidden_states[-1].mean(dim=(2, 3)))
    assert len(extractor.id2label) == 4
    assert not model.base_model._forward_hooks


def test_the_image_half_of_clip_and_an_encoder_without_a_pooler(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**sizes, "vocab_size": 64}, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "clip")
    extractor = ImageFeatureExtractor.from_pretrained(tmp_path / "clip")
    assert extractor(colours(2)).features.shape == (2, 16)

    vit = ViTModel(ViTConfig(**vision), add_pooling_layer=False).eval()
    extractor = ImageFeatureExtractor(vit, processor, name="vit")
    with torch.no_grad():
        tokens = vit(pixel_values=processor(colours(2), return_tensors="pt").pixel_values).last_hidden_state
    torch.testing.assert_close(extractor(colours(2)).features, tokens.mean(dim=1))


def test_mae_sees_the_whole_image(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = ViTMAEModel(ViTMAEConfig(**sizes, image_size=16, patch_size=4))
    encoder.half().save_pretrained(tmp_path)
    BitImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(tmp_path)
    extractor = ImageFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.model.dtype == torch.float32  # whatever it was saved in
    images = colours(3)
    features = extractor(images).features
    direct = ImageFeatureExtractor(encoder.float(), extractor.processor, "direct")
    torch.testing.assert_close(direct(images).features, features, rtol=0, atol=1e-6)
    torch.testing.assert_close(extractor(images).features, features, rtol=0, atol=1e-6)
    images[0].putpixel((3, 3), (255, 255, 255))
    assert (extractor(images).features - features)[0].abs().max() > 1e-5


# The linear probe


def test_hidden_states_are_pooled_at_every_place(randomised_model):
    model = randomised_model(num_layers=[1, 2, 1])
    sample = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pooled = pooled_hidden_states(model, sample)
    assert list(pooled) == [(1, 1), (2, 1), (2, 2), (3, 1)]
    for place, features in pooled.items():
        expected = model(sample, output_hidden_states=[place]).hidden_states[place].mean(dim=1).float()
        torch.testing.assert_close(features, expected)


def test_a_probe_reads_what_is_linear_and_nothing_else():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 5)) * [1, 10, 100, 1, 1] + 50
    linear = (features[:, 0] > 50).astype(int)
    chance = rng.integers(0, 2, 400)
    assert linear_probe(features[:300], linear[:300], features[300:], linear[300:]) > 0.95
    assert linear_probe(features[:300], chance[:300], features[300:], chance[300:]) < 0.65


# Bad input


def test_bad_input():
    reference = reference_of(random_features(20))
    with pytest.raises(ValueError, match=r"`predictions` must have shape \(num_images, feature_dim\)"):
        FrechetDistance(reference).add_batch(predictions=torch.zeros(6))
    with pytest.raises(
        ValueError, match="`predictions` have 5 features an image, but the reference, of 'random', has 6"
    ):
        FrechetDistance(reference).compute(predictions=torch.zeros(9, 5))
    with pytest.raises(ValueError, match="FrechetDistance needs at least two images, but was given 0"):
        FrechetDistance(reference).compute()
    with pytest.raises(ValueError, match="A reference needs at least two images, but 'real' has 1"):
        reference_of(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="`num_neighbors` is 3.* but there are 3 generated ones"):
        PrecisionRecall(reference).compute(predictions=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="Only a FrechetDistance of 'random' can be merged into one.*KernelDistance"):
        FrechetDistance(reference).merge(KernelDistance(reference))
    with pytest.raises(ValueError, match="training images of at least two classes"):
        linear_probe(np.zeros((4, 2)), np.zeros(4), np.zeros((4, 2)), np.zeros(4))


@pytest.mark.parametrize(
    "module, call, message",
    [
        ("torchmetrics", lambda: InceptionScore("judge"), r"needs torchmetrics: pip install \"flowback_hf\[eval\]\""),
        ("sklearn.linear_model", lambda: linear_probe(*[np.zeros(2)] * 4), r"scikit-learn: .*flowback_hf\[eval\]"),
        ("torch_fidelity", InceptionFeatureExtractor, r"torchvision: pip install \"flowback_hf\[fid\]\""),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, module, call, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        call()
