import io
import json
import math
import warnings

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.pipelines.pipeline_flowback import fit_image
from flowback_hf.pipelines.pipeline_flowback_classification import apply_noise, image_generator


METHODS = ("gradient", "ascent", "bayes", "shortlist")
ID2LABEL = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark", 3: "hammerhead", 4: "stingray"}


def make_pipe(transformer, **components):
    pipeline = FlowBackClassificationPipeline(transformer, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe(randomised_model):
    return make_pipe(randomised_model(), id2label=ID2LABEL)  # float64


def random_images(num_images, seed=0, channels=3, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_images, channels, size, size, generator=generator, dtype=torch.float64)


def pil_images(num_images, seed=0, size=(4, 4)):
    rng = np.random.default_rng(seed)
    return [PIL.Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(num_images)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_log_prob(model, sample, embeddings):
    """log p(x) of one sample with one class embedding for each block, the flow written out block by block."""
    tokens = model.patchify(sample[None])
    log_abs_det = 0
    for block, embedding in zip(model.blocks, embeddings):
        own_order = tokens.flip(1) if block.reverse_order else tokens
        positions = block.pos_embed.flip(0) if block.reverse_order else block.pos_embed
        hidden_states = block.proj_in(own_order) + positions + embedding
        for layer in block.layers:
            hidden_states = layer(hidden_states)
        log_scale, shift = block.proj_out(hidden_states)[0, :-1].chunk(2, dim=-1)
        zeros = torch.zeros_like(log_scale[:1])
        log_scale, shift = torch.cat([zeros, log_scale])[None], torch.cat([zeros, shift])[None]
        own_order = (own_order - shift) * torch.exp(-log_scale)
        log_abs_det = log_abs_det - log_scale.sum()
        tokens = own_order.flip(1) if block.reverse_order else own_order
    return -0.5 * (tokens.square() + math.log(2 * math.pi)).sum() + log_abs_det


# The gradient


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), num_blocks=st.integers(1, 3), num_classes=st.integers(1, 7))
def test_the_gradient_is_autograds_through_naive_soft_embeddings(randomised_model, seed, num_blocks, num_classes):
    model = randomised_model(seed=seed, num_blocks=num_blocks, num_classes=num_classes)
    images = random_images(2, seed)
    scores = make_pipe(model).class_scores(images, "gradient", num_noise_draws=0)
    for image, image_scores in zip(images, scores):
        logits = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        embeddings = [
            sum(weight * row for weight, row in zip(logits.softmax(0), block.class_embed)) for block in model.blocks
        ]
        naive_log_prob(model, 2 * image - 1, embeddings).backward()
        torch.testing.assert_close(image_scores, num_classes * logits.grad, rtol=0, atol=1e-10)
    assert num_classes == 1 or scores.abs().max() > 1e-3


def test_the_gradient_is_the_one_of_the_method_page(pipe):
    """K g_k = sum over blocks of <d log p / d e, E_k - mean E>."""
    sample = 2 * random_images(1) - 1
    shifts = [torch.zeros(8, dtype=torch.float64, requires_grad=True) for _ in pipe.transformer.blocks]
    embeddings = [block.class_embed.mean(dim=0) + shift for block, shift in zip(pipe.transformer.blocks, shifts)]
    gradients = torch.autograd.grad(naive_log_prob(pipe.transformer, sample[0], embeddings), shifts)
    expected = sum(
        (block.class_embed - block.class_embed.mean(dim=0)) @ gradient
        for block, gradient in zip(pipe.transformer.blocks, gradients)
    )
    actual = pipe.class_scores((sample + 1) / 2, "gradient", num_noise_draws=0)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_the_gradient_is_the_first_order_of_bayes(randomised_model):
    """Where the classes lie close together, K g_k is log p(x | k) - log p(x | no class)."""
    model = randomised_model()
    for block in model.blocks:
        block.class_embed.data.mul_(1e-5)
    images = random_images(3)
    pipeline = make_pipe(model)
    no_class = pipeline.log_prob(images, num_noise_draws=0)
    log_prob = torch.stack([pipeline.log_prob(images, [k] * 3, num_noise_draws=0) for k in range(5)], dim=1)
    scores = pipeline.class_scores(images, "gradient", num_noise_draws=0)
    assert scores.abs().max() > 1e-6
    torch.testing.assert_close(scores, log_prob - no_class[:, None], rtol=1e-3, atol=1e-9)


def saved_bytes_and_passes(pipeline, images):
    """What a gradient keeps for its backward, apart from the flow's parameters, and how often the flow ran."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in pipeline.transformer.parameters()}
    saved, passes = {}, []
    handle = pipeline.transformer.register_forward_hook(lambda *args: passes.append(1))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pipeline.class_scores(images, "gradient", num_noise_draws=0)
    handle.remove()
    return sum(storage.nbytes() for storage in saved.values()), len(passes)


def test_the_gradient_costs_one_pass_and_no_memory_for_its_classes(randomised_model):
    sizes = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16}
    costs = []
    for num_classes in (10, 1000):
        pipeline = make_pipe(randomised_model(num_classes=num_classes, **sizes))
        costs.append(saved_bytes_and_passes(pipeline, random_images(4, size=8)))
    (few_bytes, few_passes), (many_bytes, many_passes) = costs
    assert few_passes == many_passes == 1
    assert few_bytes <= many_bytes < 1.1 * few_bytes


# Bayes, the shortlist, the ascent


def test_bayes_is_the_posterior_of_k_forwards(pipe):
    images = random_images(3)
    log_prob = torch.stack(
        [pipe.transformer.log_prob(2 * images - 1, torch.full((3,), k)) for k in range(5)], dim=1
    ).detach()
    expected = torch.exp(log_prob - log_prob.logsumexp(dim=1, keepdim=True))
    for batch_size in (1, 4, 100):  # chunks that end within an image, and one that holds all pairs
        scores = pipe.class_scores(images, "bayes", num_noise_draws=0, batch_size=batch_size)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    assert (expected.argmax(dim=1) != expected.argmax(dim=1)[0]).any() or expected.max() < 0.999


def test_bayes_shows_the_flow_no_more_than_a_chunk(pipe):
    sizes = []
    pipe.transformer.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    pipe.class_scores(random_images(3), "bayes", num_noise_draws=2, batch_size=4)
    # 3 images of 5 classes, of which one chunk of 4 pairs after another, twice for the draws
    assert max(sizes) == 4 and sum(sizes) == 2 * 15


@pytest.mark.parametrize("shortlist_size", [1, 2, 5, 9])
def test_the_shortlist_is_bayes_among_the_first_of_the_gradient(pipe, shortlist_size):
    images = random_images(4)
    gradient = pipe.class_scores(images, "gradient")
    bayes = pipe.class_scores(images, "bayes")
    shortlist = pipe.class_scores(images, "shortlist", shortlist_size=shortlist_size)
    kept = torch.zeros_like(bayes).scatter(1, gradient.topk(min(shortlist_size, 5)).indices, 1.0)
    expected = kept * bayes / (kept * bayes).sum(dim=1, keepdim=True)
    torch.testing.assert_close(shortlist, expected, rtol=0, atol=1e-10)


def test_scores_are_distributions_where_they_are_said_to_be(pipe):
    images = random_images(3)
    for method in ("ascent", "bayes", "shortlist"):
        scores = pipe.class_scores(images, method, shortlist_size=3)
        assert (scores >= 0).all()
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    # and the gradient's sum to none
    gradient = pipe.class_scores(images, "gradient")
    assert gradient.abs().max() > 0.1 and gradient.sum(dim=1).abs().max() < 1e-10


def test_one_step_of_ascent_is_the_gradient(pipe):
    images = random_images(3)
    scores = pipe.class_scores(images, "ascent", num_steps=1, learning_rate=0.3)
    gradient = pipe.class_scores(images, "gradient")
    torch.testing.assert_close(scores, (0.3 * gradient).softmax(dim=1), rtol=0, atol=1e-10)


def test_ascent_climbs(pipe):
    images = random_images(8)

    def reached(num_steps):
        arguments = {"num_steps": num_steps, "learning_rate": 1e-3, "tolerance": 0.0, "num_noise_draws": 0}
        weights = pipe.class_scores(images, "ascent", **arguments)
        return pipe.transformer.log_prob(2 * images - 1, weights).detach()

    start = pipe.transformer.log_prob(2 * images - 1).detach()
    assert (start < reached(2)).all() and (reached(2) < reached(12)).all()


def test_ascent_undoes_a_step_that_loses(pipe):
    images = random_images(16)
    leap = {"learning_rate": 30.0, "num_noise_draws": 0}
    sample, start = 2 * images - 1, pipe.log_prob(images, num_noise_draws=0)
    leapt = pipe.class_scores(images, "ascent", num_steps=1, **leap)
    lost = pipe.transformer.log_prob(sample, leapt).detach() < start
    assert 0 < lost.sum() < 16
    scores = pipe.class_scores(images, "ascent", num_steps=2, **leap)
    torch.testing.assert_close(scores[lost], torch.full_like(scores[lost], 0.2), rtol=0, atol=1e-10)
    assert (scores[~lost].amax(dim=1) > 0.5).all()


def test_ascent_is_the_loop_of_its_docstring(pipe):
    image, steps, rate = random_images(1), 4, 0.02
    logits = torch.zeros(1, 5, dtype=torch.float64)
    log_probs = []
    for _ in range(steps):
        logits = logits.detach().requires_grad_()
        log_prob = pipe.transformer.log_prob(2 * image - 1, logits.softmax(dim=1))
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        logits = logits + rate * 5 * gradient
        log_probs.append(log_prob.item())
    assert log_probs == sorted(log_probs)  # no step was undone
    arguments = {"num_steps": steps, "learning_rate": rate, "tolerance": 0.0, "num_noise_draws": 0}
    actual = pipe.class_scores(image, "ascent", **arguments)
    torch.testing.assert_close(actual, logits.detach().softmax(dim=1), rtol=0, atol=1e-10)


def test_ascent_undoes_only_the_last_step(pipe):
    """An image that rises first and falls then keeps what it had risen to."""
    images = random_images(16)
    arguments = {"learning_rate": 0.6, "tolerance": 0.0, "num_noise_draws": 0}
    sample, start = 2 * images - 1, pipe.log_prob(images, num_noise_draws=0)
    steps = [pipe.class_scores(images, "ascent", num_steps=number, **arguments) for number in (1, 2, 3)]
    one, two = (pipe.transformer.log_prob(sample, weights).detach() for weights in steps[:2])
    turned = (start < one) & (two < one)
    assert turned.any()
    torch.testing.assert_close(steps[2][turned], steps[0][turned], rtol=0, atol=1e-10)


def test_ascent_stops_early_image_by_image(pipe):
    sizes = []
    pipe.transformer.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    pipe.class_scores(random_images(8), "ascent", num_steps=50, learning_rate=0.05, tolerance=0.2)
    assert sizes[0] == sizes[1] == 8 and sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 8 and len(sizes) < 50


# Batches and noise


@pytest.mark.parametrize("method", METHODS)
def test_the_score_of_an_image_depends_on_no_other(pipe, method):
    """Neither on its place, nor on the batch, nor on the images beside it."""
    images = random_images(5)
    arguments = {"method": method, "num_noise_draws": 2, "shortlist_size": 2}
    together = pipe.class_scores(images, generator=seeded(3), **arguments)
    apart = pipe.class_scores(images, generator=seeded(3), batch_size=1, **arguments)
    alone = torch.cat([pipe.class_scores(image, generator=seeded(3), **arguments) for image in images])
    order = torch.tensor([4, 0, 0, 3, 1, 2, 4])
    shuffled = pipe.class_scores(images[order], generator=seeded(3), batch_size=3, **arguments)
    for scores in (apart, alone):
        torch.testing.assert_close(scores, together, rtol=0, atol=1e-10)
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-10)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("vae", [False, True])
def test_the_noise_of_an_image_is_the_same_to_the_bit(pipe, latent_pipe, vae):
    pipe = latent_pipe if vae else pipe
    images = random_images(4, size=pipe.image_size)
    noise = pipe.add_noise(images, 3, seeded(3)) - pipe.encode(images)
    order = [2, 2, 0]
    samples = pipe.add_noise(images[order], 3, seeded(3))
    # The VAE rounds differently in batches of other sizes; the noise is the same.
    torch.testing.assert_close(samples - pipe.encode(images[order]), noise[:, order], rtol=0, atol=1e-6)
    if not vae:
        assert torch.equal(samples, pipe.add_noise(images, 3, seeded(3))[:, order])
        assert torch.equal(samples[:, :1], pipe.add_noise(images[2], 3, seeded(3)))
    # independent: draws of one image, and images of one call
    vectors = noise.flatten(2).flatten(0, 1)
    similarity = torch.corrcoef(vectors) - torch.eye(len(vectors))
    assert similarity.abs().max() < 0.6 and (vectors.std(dim=1) > 0).all()


def test_a_generator_gives_a_new_seed_to_every_call(pipe):
    images = random_images(2)
    generator = seeded(3)
    first, second = (pipe.class_scores(images, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, pipe.class_scores(images, generator=seeded(3)), rtol=0, atol=0)
    bytes_of_an_image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    seeds = {image_generator(bytes_of_an_image / 255, seed).initial_seed() for seed in (0, 1, 2**62)}
    seeds.add(image_generator(bytes_of_an_image.flip(0) / 255, 0).initial_seed())
    assert len(seeds) == 4


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
@pytest.mark.parametrize("method", ["gradient", "bayes"])
def test_noise_is_averaged_over(randomised_model, noise_type, method):
    model = randomised_model(noise_std=0.3, noise_type=noise_type)
    image = (random_images(1) * 255).round() / 255
    pipeline = make_pipe(model)
    noisy = pipeline.add_noise(image, 3, seeded(7))[:, 0]
    assert noisy.shape == (3, 3, 4, 4) and len(noisy.unique(dim=0)) == 3
    actual = pipeline.class_scores(image, method, num_noise_draws=3, generator=seeded(7))
    log_prob = torch.stack([model.log_prob(noisy, torch.full((3,), k)).mean() for k in range(5)]).detach()
    if method == "bayes":
        expected = log_prob.softmax(dim=0)
    else:
        weights = torch.full((3, 5), 0.2, dtype=torch.float64, requires_grad=True)
        model.log_prob(noisy, weights).mean().backward()
        expected = weights.grad.sum(dim=0) - weights.grad.sum(dim=0).mean()
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-10)
    likelihood = pipeline.log_prob(image, [2], num_noise_draws=3, generator=seeded(7))
    torch.testing.assert_close(likelihood, log_prob[2:3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
def test_the_noise_is_that_of_training(randomised_model, noise_type):
    pipeline = make_pipe(randomised_model(noise_std=0.3, noise_type=noise_type))
    image = (random_images(1) * 255).round() / 255
    noisy = pipeline.add_noise(image, 2000)[:, 0]
    if noise_type == "gaussian":
        noise = (noisy - (2 * image - 1)) / 0.3
        assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    else:
        noise = (noisy + 1) * 128 - image * 255
        assert 0 <= noise.min() < 0.001 and 0.999 < noise.max() < 1 + 1e-9 and abs(noise.mean() - 0.5) < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_draws_of_no_noise_change_nothing(randomised_model, method):
    pipeline = make_pipe(randomised_model(noise_std=0.0))
    images = random_images(6)
    # a tolerance at which some images stop and others go on
    arguments = {"num_steps": 6, "tolerance": 0.5}
    one = pipeline.class_scores(images, method, num_noise_draws=1, **arguments)
    three = pipeline.class_scores(images, method, num_noise_draws=3, **arguments)
    torch.testing.assert_close(three, one, rtol=0, atol=1e-10)


def test_the_noise_is_the_same_in_every_call_and_other_with_another_seed(pipe):
    images = random_images(2)
    first, second = pipe.class_scores(images), pipe.class_scores(images)
    assert torch.equal(first, second)
    assert not torch.equal(first, pipe.class_scores(images, generator=seeded(1)))
    assert not torch.equal(first, pipe.class_scores(images, num_noise_draws=0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode(pipe, mode):
    images = random_images(2)
    expected = {method: pipe.class_scores(images, method) for method in METHODS}
    with mode():
        for method in METHODS:
            scores = pipe.class_scores(images, method)
            assert not scores.requires_grad and torch.equal(scores, expected[method])
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


# What comes out, what goes in


def test_the_result_is_that_of_an_image_classification_pipeline(pipe):
    images = pil_images(3)
    classes = pipe(images, top_k=2)
    assert [[set(entry) for entry in image] for image in classes] == [[{"label", "score"}] * 2] * 3
    values, indices = pipe.class_scores(images).topk(2)
    assert [entry["label"] for entry in classes[0]] == [ID2LABEL[k] for k in indices[0].tolist()]
    assert [entry["score"] for entry in classes[0]] == values[0].tolist()
    (best, _) = pipe(images[0], top_k=2)  # one image, one list
    assert best == {"label": classes[0][0]["label"], "score": pytest.approx(classes[0][0]["score"], abs=1e-10)}
    assert len(pipe(images[0], top_k=99)) == len(pipe(images[0], top_k=None)) == 5


def test_the_default_is_bayes_among_five_classes(randomised_model):
    images = random_images(4)
    for num_classes in (1, 3, 5):  # no more than the shortlist holds: Bayes' rule itself, without a gradient
        pipeline = make_pipe(randomised_model(num_classes=num_classes))
        passes = []
        pipeline.transformer.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
        scores = pipeline.class_scores(images)
        assert sum(passes) == 4 * num_classes
        torch.testing.assert_close(scores, pipeline.class_scores(images, "bayes"), rtol=0, atol=0)
    pipeline = make_pipe(randomised_model(num_classes=12))
    for classes in pipeline(images, top_k=None):
        scores, labels = zip(*((entry["score"], int(entry["label"])) for entry in classes))
        assert list(scores) == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)
        assert set(labels) == set(range(12))
        # What was not compared comes last, in the order of the ids.
        assert scores[4] > 0 == scores[5] and list(labels[5:]) == sorted(labels[5:])


def test_labels_are_numbers_without_names(randomised_model):
    classes = make_pipe(randomised_model())(pil_images(1))
    assert sorted(entry["label"] for entry in classes[0]) == ["0", "1", "2", "3", "4"]


def image_forms(images, folder):
    arrays = np.stack([np.asarray(image) for image in images])
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths):
        image.save(path)
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    return {
        "paths": paths,
        "strings": [str(path) for path in paths],
        "uint8 array": arrays,
        "float arrays": list(arrays.astype(np.float64) / 255),
        "uint8 tensors": list(torch.from_numpy(arrays).permute(0, 3, 1, 2)),
        "float tensor": torch.from_numpy(arrays).permute(0, 3, 1, 2).double() / 255,
        "column": rows["image"],
        "data set": rows.add_column("number", [3, 1, 2]),
        "stream": rows.to_iterable_dataset(),
        "folder": folder,
        "string of a folder": str(folder),
        "generator": (image for image in images),
    }


def test_every_form_of_images_gives_the_same(pipe, tmp_path):
    images = pil_images(3)
    expected = pipe.class_scores(images, "gradient", batch_size=2)
    for name, form in image_forms(images, tmp_path).items():
        actual = pipe.class_scores(form, "gradient", batch_size=2)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=name)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_a_folder_is_searched_for_images_only(pipe, tmp_path):
    images = pil_images(3)
    names = ["b/2.PNG", "a.png", "b/.hidden.png"]
    (tmp_path / "b").mkdir()
    for image, name in zip(images, names):
        image.save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    expected = pipe.class_scores([images[1], images[0]])
    torch.testing.assert_close(pipe.class_scores(tmp_path), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_images", [1, 3, 4, 6])
def test_grey_images_need_no_channels(randomised_model, num_images):
    pipeline = make_pipe(randomised_model(in_channels=1, sample_size=8))
    images = random_images(num_images, channels=1, size=8)
    expected = pipeline.class_scores(images)
    assert len(pipeline(images[:, 0].numpy())) == num_images
    torch.testing.assert_close(pipeline.class_scores(images[:, 0].numpy()), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(pipeline.class_scores(list(images[:, 0])), expected, rtol=0, atol=1e-10)
    if num_images == 3:  # or one coloured image
        with pytest.raises(
            ValueError, match=r"of shape \(3, 8, 8\) could be three grey images or one of three channels"
        ):
            pipeline(images[:, 0])
    else:
        torch.testing.assert_close(pipeline.class_scores(images[:, 0]), expected, rtol=0, atol=1e-10)


def test_one_array_of_a_coloured_image_is_one_image(randomised_model, pipe):
    grey = make_pipe(randomised_model(in_channels=1))
    array = np.asarray(pil_images(1)[0])
    for pipeline in (grey, pipe):
        assert set(pipeline(array, top_k=1)[0]) == {"label", "score"}
        mirrored = array[:, ::-1]  # a view with a negative stride
        assert torch.equal(pipeline.log_prob(mirrored), pipeline.log_prob(mirrored.copy()))
        with pytest.raises(ValueError, match=r"Image 0 must have 1 or 3 channels, but its shape is \(4, 4, 4\)"):
            pipeline(np.dstack([array, array[..., :1]]))  # with transparency
    with pytest.raises(ValueError, match=r"Image 0 must have 1 or 3 channels, but its shape is \(8, 8, 1\)"):
        grey(torch.zeros(8, 8, 1))  # a tensor with its channels last
    with pytest.raises(ValueError, match=r"Image 0 must have 1 or 3 channels, but its shape is \(6, 8, 8\)"):
        pipe(np.zeros((6, 8, 8), dtype=np.uint8))  # grey images without channels, for a flow of coloured ones


def test_a_data_set_must_have_one_column_of_images(pipe):
    features = datasets.Features(
        {"left": datasets.Image(), "right": datasets.Image(), "label": datasets.Value("int64")}
    )
    rows = {"left": pil_images(2), "right": pil_images(2, seed=1), "label": [0, 1]}
    pairs = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(ValueError, match=r"one column of images, but 2 of its columns \['left', 'right', 'label'\]"):
        pipe(pairs)
    with pytest.raises(ValueError, match="but 0 of its columns"):
        pipe(pairs.select_columns(["label"]))
    with pytest.raises(ValueError, match=r"is a mapping of \['train'\]. Pass one of its values"):
        pipe(datasets.DatasetDict({"train": pairs}))
    torch.testing.assert_close(pipe.class_scores(pairs.remove_columns("right")), pipe.class_scores(rows["left"]))


def test_what_the_sampling_pipeline_gives_is_understood(randomised_model):
    sampler = FlowBackPipeline(randomised_model(noise_std=0.05).float())
    sampler.set_progress_bar_config(disable=True)
    classifier = FlowBackClassificationPipeline.from_pipe(sampler)
    classifier.set_progress_bar_config(disable=True)
    scores = []
    for output_type in ("pil", "np", "pt"):
        images = sampler(class_labels=[0, 1], generator=seeded(), output_type=output_type).images
        scores.append(classifier.class_scores(images))
    torch.testing.assert_close(scores[1], scores[2])
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0.2)  # PIL's are rounded to 8 bits


@pytest.mark.parametrize("size", [(9, 12), (30, 7), (3, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_that_of_training(randomised_model, size, channels):
    pipeline = make_pipe(randomised_model(in_channels=channels))
    (image,) = pil_images(1, size=size)
    with pytest.warns(UserWarning, match="Images that are not 4x4 pixels are resized and center-cropped"):
        sample = pipeline.encode(image)
    fitted = PIL.ImageOps.fit(image.convert({1: "L", 3: "RGB"}[channels]), (4, 4), PIL.Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(fitted)).view(4, 4, channels).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(sample[0], expected.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(9, 12), (13, 8), (30, 7), (7, 7), (3, 3), (1, 5), (101, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_image_is_fitted_as_by_resizing_its_middle_square(size, mode):
    """Byte for byte, also where the middle square begins between two pixels."""
    image = pil_images(1, size=size)[0].convert(mode)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    for target in (4, 7, 64):
        box = (left, top, left + side, top + side)
        expected = image.resize((target, target), PIL.Image.Resampling.BICUBIC, box=box)
        fitted = fit_image(image, target)
        assert fitted.size == (target, target) and fitted.mode == mode
        assert fitted.tobytes() == expected.tobytes(), (size, target)


def test_noise_is_applied_as_in_training():
    sample = torch.arange(256) / 255 * 2 - 1  # float32: not all of them are whole pixels again
    gaussian, uniform = torch.randn(256, generator=seeded()), torch.rand(256, generator=seeded())
    assert torch.equal(apply_noise(sample, gaussian, "gaussian", 0.3), sample + 0.3 * gaussian)
    noisy = apply_noise(sample, uniform, "uniform", 0.3)
    assert torch.equal(noisy, (torch.arange(256) + uniform) / 128 - 1)
    assert not torch.equal(noisy, ((sample + 1) * 127.5 + uniform) / 128 - 1)
    with pytest.raises(ValueError, match="`noise_type` must be 'gaussian' or 'uniform', but is 'pink'"):
        apply_noise(sample, gaussian, "pink", 0.3)


def test_grey_flows_take_coloured_images_and_the_other_way_round(randomised_model, pipe):
    grey = make_pipe(randomised_model(in_channels=1))
    image = PIL.Image.new("RGB", (4, 4), (90, 90, 90))
    expected = torch.full((1, 1, 4, 4), 90 / 127.5 - 1, dtype=torch.float64)
    torch.testing.assert_close(grey.encode(image), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(pipe.encode(image.convert("L")), expected.expand(1, 3, 4, 4), rtol=0, atol=1e-6)
    tensor = torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)
    torch.testing.assert_close(grey.encode(tensor), expected, rtol=0, atol=1e-6)


def test_images_of_the_right_size_are_not_warned_about(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(pil_images(2))


# Likelihoods


def test_log_prob_is_the_flows(pipe):
    images, labels = random_images(4), [2, -1, 0, 4]
    expected = pipe.transformer.log_prob(2 * images - 1, torch.tensor(labels)).detach()
    actual = pipe.log_prob(images, labels, num_noise_draws=0, batch_size=3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert torch.equal(pipe.log_prob(images, torch.tensor(labels), num_noise_draws=0, batch_size=3), actual)
    names = ["great white shark", -1, "Tinca tinca", 4]
    assert torch.equal(pipe.log_prob(images, names, num_noise_draws=0, batch_size=3), actual)


def test_bits_per_dim_of_an_untrained_flow_are_the_analytic_value(randomised_model):
    """All 256 pixel values once: uniform noise, of which N(0, 1) has 1/6 + log(2 pi) / 2 nats, plus log 128."""
    model = randomised_model(sample_size=16, in_channels=1, patch_size=4)
    for block in model.blocks:
        block.proj_out.reset_parameters()  # the identity
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = make_pipe(randomised_model(sample_size=16, in_channels=1, patch_size=4, noise_type="uniform")).add_noise(
        image, 500, seeded()
    )
    exact = (0.5 * x.square().mean() + 0.5 * math.log(2 * math.pi) + math.log(128)) / math.log(2)
    bits = make_pipe(model).bits_per_dim(image, num_noise_draws=500, generator=seeded()).item()
    assert bits == pytest.approx(exact.item(), abs=1e-10)
    # The draws are uniform in [0, 1): 500 of them come within a few standard errors of the expectation.
    analytic = (1 / 6 + 0.5 * math.log(2 * math.pi) + math.log(128)) / math.log(2)
    assert analytic == pytest.approx(8.566, abs=5e-4)
    standard_error = (0.5 * x.square().flatten(1).mean(dim=1)).std().item() / 500**0.5 / math.log(2)
    assert abs(bits - analytic) < 4 * standard_error < 1e-3


def test_bits_per_dim_are_those_of_the_log_prob(randomised_model):
    pipeline = make_pipe(randomised_model(noise_type="uniform"))
    images = pil_images(3)
    log_prob = pipeline.log_prob(images, [0, 1, 2], num_noise_draws=2)
    bits = pipeline.bits_per_dim(images, [0, 1, 2], num_noise_draws=2)
    torch.testing.assert_close(bits, (-log_prob / 48 + math.log(128)) / math.log(2), rtol=0, atol=1e-10)


def test_the_out_of_distribution_score_is_the_distance_from_typical_likelihoods(pipe):
    images = random_images(4)
    reference = torch.tensor([-3.0, -5.0, -7.0], dtype=torch.float64)
    expected = (pipe.log_prob(images, num_noise_draws=2) + 5.0).abs() / 2.0
    actual = pipe.out_of_distribution_score(images, reference, num_noise_draws=2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_plain_images_and_noise_are_out_of_distribution(randomised_model):
    """An identity flow finds what lies nearest to zero likeliest: typical images lie between the two others."""
    model = randomised_model()
    for block in model.blocks:
        block.proj_out.reset_parameters()
    pipeline = make_pipe(model)
    typical = 0.5 + 0.4 * (random_images(60) - 0.5)
    plain, extreme = torch.full((1, 3, 4, 4), 0.5), (random_images(1) > 0.5).double()
    reference = pipeline.log_prob(typical[:50])
    log_prob = [pipeline.log_prob(images).mean() for images in (plain, typical[50:], extreme)]
    assert log_prob[0] > log_prob[1] > log_prob[2]
    familiar = pipeline.out_of_distribution_score(typical[50:], reference)
    assert familiar.mean() < 2
    for images in (plain, extreme):
        assert pipeline.out_of_distribution_score(images, reference).min() > 2 * familiar.max()


@pytest.mark.parametrize("reference", [[-1.0], [-1.0, -1.0], [-1.0, float("nan")], [[-1.0, -2.0]]])
def test_a_reference_that_does_not_vary_is_refused(pipe, reference):
    with pytest.raises(ValueError, match="`reference_log_prob` must hold the finite log-likelihoods of at least two"):
        pipe.out_of_distribution_score(random_images(1), torch.tensor(reference))


# Repositories, latent flows, offloading


def test_the_same_repository_serves_sampling_and_classification(randomised_model, tmp_path, library_log):
    sampler = FlowBackPipeline(randomised_model().float(), id2label=ID2LABEL, guidance_scale=1.5)
    sampler.save_pretrained(tmp_path / "sampler")
    classifier = FlowBackClassificationPipeline.from_pretrained(tmp_path / "sampler")
    images = pil_images(2)
    expected = FlowBackClassificationPipeline.from_pipe(sampler)(images)
    assert classifier(images) == expected and expected[0][0]["label"] in ID2LABEL.values()

    classifier.save_pretrained(tmp_path / "classifier")
    assert FlowBackClassificationPipeline.from_pretrained(tmp_path / "classifier")(images) == expected
    again = FlowBackPipeline.from_pretrained(tmp_path / "classifier")
    assert again.config.guidance_scale == 1.5 and again.labels == sampler.labels

    assert "not expected" not in library_log.text
    index = json.loads((tmp_path / "classifier" / "model_index.json").read_text())
    (tmp_path / "classifier" / "model_index.json").write_text(json.dumps(index | {"other_scale": 1.5}))
    FlowBackClassificationPipeline.from_pretrained(tmp_path / "classifier")
    assert "not expected" in library_log.text  # diffusers warns of any other setting


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_pipe_shares_the_flow_and_leaves_its_dtype(randomised_model, dtype):
    sampler = FlowBackPipeline(randomised_model().to(dtype), id2label=ID2LABEL)
    classifier = FlowBackClassificationPipeline.from_pipe(sampler)
    assert classifier.transformer is sampler.transformer and classifier.transformer.dtype == dtype
    assert classifier.config.id2label == sampler.config.id2label
    scores = classifier.class_scores(pil_images(2))
    assert scores.dtype == torch.promote_types(dtype, torch.float32) and torch.isfinite(scores).all()


@pytest.fixture
def latent_pipe(randomised_model):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.5,
    ).eval()
    return make_pipe(randomised_model(in_channels=4, noise_std=0.3).float(), vae=vae)


def test_a_latent_flow_sees_the_vaes_latents(latent_pipe):
    assert latent_pipe.image_size == 8
    images = random_images(2, size=8).float()
    with torch.no_grad():
        latents = latent_pipe.vae.encode(2 * images - 1).latent_dist.mode() * 0.5
        expected = latent_pipe.transformer.log_prob(latents, torch.tensor([1, 3]))
    assert latents.shape == (2, 4, 4, 4)
    torch.testing.assert_close(latent_pipe.log_prob(images, [1, 3], num_noise_draws=0), expected)
    assert latent_pipe.class_scores(images, "bayes").shape == (2, 5)
    with pytest.raises(
        ValueError, match="Bits per dimension are defined for pixels, but this flow models a VAE's latents"
    ):
        latent_pipe.bits_per_dim(images)


@pytest.mark.parametrize("method", METHODS)
def test_offloading(latent_pipe, method):
    images = random_images(2, size=8).float()
    expected = latent_pipe.class_scores(images, method)
    latent_pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(latent_pipe.class_scores(images, method), expected)
    latent_pipe.remove_all_hooks()
    cpu_offload(latent_pipe.transformer, torch.device("cpu"))
    assert torch.equal(latent_pipe.class_scores(images, method), expected)


def test_the_progress_bar_counts_images(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(pil_images(3), batch_size=2)
    assert "3/3" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "guess"}, "`method` must be one of .*'shortlist'.* but is 'guess'"),
        ({"top_k": 0}, "`top_k` must be a whole number of at least 1, but is 0"),
        ({"num_noise_draws": -1}, "`num_noise_draws` must be a whole number of at least 0, but is -1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, but is 0"),
        ({"num_steps": 0}, "`num_steps` must be a whole number of at least 1, but is 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite number above 0.0, but is 0.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number above 0.0, but is nan"),
        ({"tolerance": -1.0}, "`tolerance` must be a finite number of at least 0.0, but is -1.0"),
        ({"shortlist_size": 0}, "`shortlist_size` must be a whole number of at least 1, but is 0"),
        ({"images": []}, "`images` must hold at least one image, but are empty"),
        ({"images": [1, 2]}, "Image 0 must be a PIL image, an array, a tensor or a path, but is of type int"),
        ({"images": [torch.rand(3, 4, 4), torch.rand(3, 4, 4) - 2]}, r"Image 1 must hold floats in \[0, 1\] or uint8"),
        *[
            ({"images": [np.zeros((4, 4, 3)), np.zeros((4, 4, 3), dtype)]}, r"Image 1 must hold floats in \[0, 1\] or")
            for dtype in ("uint16", "complex64", ">f4", "object")
        ],
        ({"images": torch.ones(1, 3, 4, 4, dtype=torch.int64)}, "or uint8, but holds torch.int64 from 1 to 1"),
        ({"images": torch.rand(2, 5, 4, 4)}, r"Image 0 must have 1 or 3 channels, but its shape is \(5, 4, 4\)"),
        ({"images": ["nowhere.png"]}, "Image 0, 'nowhere.png', cannot be read"),
        ({"images": iter([])}, "`images` must hold at least one image, but are empty"),
        ({"generator": [torch.Generator()]}, "`generator` must be one `torch.Generator` or None, but is of type list"),
    ],
)
def test_bad_input_raises_before_any_work(pipe, monkeypatch, arguments, message):
    def no_work(*args, **kwargs):
        pytest.fail("the flow ran")

    monkeypatch.setattr(type(pipe.transformer.blocks[0]), "forward", no_work)
    with pytest.raises(ValueError, match=message):
        pipe(**{"images": pil_images(2), **arguments})


def test_strict_refuses_what_would_be_converted(pipe):
    small, grey = pil_images(1, size=(9, 12))[0], PIL.Image.new("L", (4, 4))
    with pytest.raises(ValueError, match="Image 1 must be 4x4 pixels of mode RGB, but is 9x12 of mode RGB"):
        pipe([pil_images(1)[0], small], strict=True)
    with pytest.raises(ValueError, match="Image 0 must be 4x4 pixels of mode RGB, but is 4x4 of mode L"):
        pipe(grey, strict=True)
    with pytest.raises(ValueError, match=r"Image 0 must have 3 channels of 4x4 pixels, but has shape \(3, 5, 5\)"):
        pipe(torch.rand(3, 5, 5), strict=True)


def test_a_file_that_is_no_image_is_named(pipe, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    buffer = io.BytesIO()
    pil_images(1)[0].save(buffer, format="PNG")
    (tmp_path / "truncated.png").write_bytes(buffer.getvalue()[:60])
    for name in ("text.png", "truncated.png"):
        with pytest.raises(ValueError, match=f"Image 0, '.*{name}', cannot be read"):
            pipe([tmp_path / name])


def test_an_unconditional_flow_has_likelihoods_and_no_classes(randomised_model):
    pipeline = make_pipe(randomised_model(num_classes=None))
    images = random_images(2)
    assert pipeline.log_prob(images).shape == (2,)
    for call in (pipeline, pipeline.class_scores):
        with pytest.raises(ValueError, match="This flow is unconditional"):
            call(images)
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model, but is"):
        pipeline.log_prob(images, [1, 2])


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 5], "`class_labels` must lie between 0 and 4, or be -1 for no class, but one is 5"),
        ([0], "one for each image, but holds 1 for more images"),
        ([0, 1, 2], "one for each image, but holds 3 for 2 images"),
        (["goldfish", "gold"], "`class_labels` must be known names or numbers, but 'gold' is not one"),
    ],
)
def test_labels_that_do_not_fit_raise(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe.log_prob(random_images(2), labels)
    with pytest.raises(ValueError, match="`num_noise_draws` must be a whole number of at least 1, but is 0"):
        pipe.bits_per_dim(random_images(2), num_noise_draws=0)
