"""Images through their latents: exact inversion, edits, likelihood maps, and class weights in sampling."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.pipelines.pipeline_flowback import slerp


NUM_CLASSES = 5
EXACT = {"guidance_scale": 1.0, "denoise": False, "output_type": "latent"}


def make_pipe(transformer, **options) -> FlowBackPipeline:
    pipeline = FlowBackPipeline(transformer, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe(randomised_model):
    """A float64 flow of 4x4 pixels in 4 tokens whose pipeline guides by default."""
    names = dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))
    return make_pipe(randomised_model(noise_std=0.2), id2label=names, guidance_scale=2.0)


@pytest.fixture
def latent_pipe(randomised_model, tiny_vae):
    return make_pipe(randomised_model(in_channels=4), vae=tiny_vae, guidance_scale=2.0)


@pytest.fixture
def unconditional_pipe(randomised_model):
    return make_pipe(randomised_model(num_classes=None))


def random_images(num_images: int, size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_differs(actual: torch.Tensor, expected: torch.Tensor, by: float = 1e-2):
    assert (actual - expected).abs().max() > by


LABELS = [
    pytest.param([2, 0, 4], id="numbers"),
    pytest.param(["cat", "ant", "eel"], id="names"),
    pytest.param([2, -1, 4], id="no class for one"),
    pytest.param(3, id="one for all"),
    pytest.param(torch.rand(3, NUM_CLASSES, generator=seeded(), dtype=torch.float64).softmax(1), id="weights"),
    pytest.param(None, id="none"),
]


# Class weights


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_one_hot_weights_sample_what_their_class_samples(pipe, guidance_scale):
    options = {"guidance_scale": guidance_scale, "output_type": "latent"}
    numbers = pipe([3, 1], generator=seeded(), **options).images
    weights = torch.eye(NUM_CLASSES, dtype=torch.float64)[[3, 1]]
    assert_close(pipe(weights, generator=seeded(), **options).images, numbers)
    assert_close(pipe(weights.bfloat16(), generator=seeded(), **options).images, numbers)


def test_equal_weights_are_no_class(pipe):
    weights = torch.full((2, NUM_CLASSES), 1 / NUM_CLASSES, dtype=torch.float64)
    no_class = pipe([-1, -1], generator=seeded(), output_type="latent").images
    assert_close(pipe(weights, generator=seeded(), output_type="latent").images, no_class)


def test_samples_of_weights_have_the_density_of_these_weights(pipe):
    """The sampler's inverse is that of the map whose density `log_prob` gives."""
    weights = torch.rand(2, NUM_CLASSES, generator=seeded(), dtype=torch.float64)
    latents = pipe.prepare_latents(2, seeded(1))
    sample = pipe(weights, latents=latents, **EXACT).images
    assert_close(pipe.transformer(sample, weights).sample, latents)
    assert_differs(pipe([0, 1], latents=latents, **EXACT).images, sample)


def test_weights_repeat_with_num_images_per_prompt(pipe):
    weights = torch.eye(NUM_CLASSES)[[3, 1]]
    options = {"generator": seeded(), "output_type": "latent"}
    repeated = pipe(weights, num_images_per_prompt=2, **options).images
    options = {"generator": seeded(), "output_type": "latent"}
    assert_close(repeated, pipe([3, 3, 1, 1], **options).images)


@pytest.mark.parametrize(
    "weights",
    [
        torch.ones(NUM_CLASSES),
        torch.ones(2, NUM_CLASSES + 1),
        torch.ones(0, NUM_CLASSES),
        torch.full((1, NUM_CLASSES), math.nan),
    ],
    ids=["one dimension", "too many classes", "empty", "nan"],
)
def test_weights_that_do_not_fit_raise(pipe, weights):
    with pytest.raises(ValueError, match="`class_labels` must be class ids or names, or finite class weights of"):
        pipe(weights)


def test_classification_takes_weights_too(pipe):
    classifier = FlowBackClassificationPipeline.from_pipe(pipe)
    classifier.set_progress_bar_config(disable=True)
    images, weights = random_images(3), torch.eye(NUM_CLASSES, dtype=torch.float64)[[2, 0, 4]]
    assert_close(classifier.log_prob(images, weights, batch_size=2), classifier.log_prob(images, [2, 0, 4]))


# Inversion


@pytest.mark.parametrize("labels", LABELS)
def test_inversion_is_undone_by_a_call(pipe, labels):
    images = random_images(3)
    latents = pipe.invert(images, labels)
    assert latents.shape == (3, 3, 4, 4) and latents.dtype == torch.float64
    assert_differs(latents, pipe.encode(images))
    options = {"num_images_per_prompt": 3} if labels is None or isinstance(labels, int) else {}
    assert_close(pipe(labels, latents=latents, **EXACT, **options).images, pipe.encode(images))


def test_inversion_of_pil_images_gives_their_very_pixels(pipe):
    pipe.transformer.float()
    arrays = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(array) for array in arrays]
    restored = pipe([1, 2], latents=pipe.invert(images, [1, 2]), guidance_scale=1.0, denoise=False).images
    assert np.array_equal(np.stack([np.asarray(image) for image in restored]), arrays)


def test_inversion_of_a_latent_flow(latent_pipe):
    images = random_images(2, size=8)
    latents = latent_pipe.invert(images, [1, 4])
    assert latents.shape == (2, 4, 4, 4)
    options = EXACT | {"output_type": "pt"}
    decoded = latent_pipe([1, 4], latents=latents, **options).images
    assert_close(decoded, latent_pipe.decode(latent_pipe.encode(images), "pt"), atol=1e-6)  # a float32 VAE


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
def test_inversion_with_the_noise_of_training(randomised_model, noise_type):
    pipeline = make_pipe(randomised_model(noise_std=0.2, noise_type=noise_type))
    images = (random_images(400) * 255).round().div(255)
    latents = pipeline.invert(images, add_noise=True, generator=seeded())
    noisy = pipeline(latents=latents, num_images_per_prompt=400, **EXACT)
    if noise_type == "gaussian":
        noise = (noisy.images - pipeline.encode(images)) / 0.2
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    else:
        noise = (noisy.images + 1) * 128 - images * 255
        assert noise.min() >= -1e-6 and noise.max() <= 1 + 1e-6
        assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.std() - 12**-0.5) < 0.01
    again = pipeline.invert(images[:2], add_noise=True, generator=seeded())
    assert_close(again, pipeline.invert(images, add_noise=True, generator=seeded())[:2])  # drawn image by image
    assert_differs(again, pipeline.invert(images[:2], add_noise=True, generator=seeded(1)))


# Likelihood maps


@pytest.mark.parametrize("labels", LABELS)
def test_the_map_sums_to_the_log_likelihood(pipe, labels):
    images = random_images(3)
    nats = pipe.likelihood_map(images, labels)
    assert nats.shape == (3, 2, 2) and nats.dtype == torch.float64 and not nats.requires_grad
    of_each, _ = pipe.encode_labels([labels] * 3 if isinstance(labels, int) else labels)
    expected = pipe.transformer.log_prob(pipe.encode(images), of_each)
    assert nats.flatten(1).std(dim=1).min() > 1e-2  # it is no constant
    assert_close(nats.sum(dim=(1, 2)), expected.detach())


def test_the_map_is_the_formula_at_every_token(pipe):
    images, labels = random_images(2), torch.tensor([4, 1])
    tokens, log_scale = pipe.transformer.patchify(pipe.encode(images)), 0
    for block in pipe.transformer.blocks:
        output = block(tokens, labels)
        tokens, log_scale = output.tokens, log_scale + output.log_scale
    expected = -(log_scale + tokens.square() / 2 + math.log(2 * math.pi) / 2).sum(dim=2)
    assert_close(pipe.likelihood_map(images, labels).flatten(1), expected.detach())
    # Token 1 is at the top right: rows first.
    assert_close(pipe.likelihood_map(images, labels)[:, 0, 1], expected[:, 1].detach())


def test_the_map_of_a_latent_flow_sums_to_the_density_of_its_latents(latent_pipe):
    images = random_images(2, size=8)
    nats = latent_pipe.likelihood_map(images, [1, -1])
    expected = latent_pipe.transformer.log_prob(latent_pipe.encode(images), torch.tensor([1, -1]))
    assert nats.shape == (2, 2, 2)
    assert_close(nats.sum(dim=(1, 2)), expected.detach())


def test_the_map_of_an_unconditional_flow(unconditional_pipe):
    nats = unconditional_pipe.likelihood_map(random_images(2))
    expected = unconditional_pipe.transformer.log_prob(unconditional_pipe.encode(random_images(2)))
    assert_close(nats.sum(dim=(1, 2)), expected.detach())


@pytest.mark.parametrize("inverse", [False, True])
def test_the_parts_of_tokens_sum_to_the_log_determinant(randomised_model, inverse):
    model, sample = randomised_model(), torch.randn(2, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    output = model(sample, torch.tensor([1, 2]), inverse=inverse, output_token_log_abs_det=True)
    assert output.token_log_abs_det.shape == (2, 4)
    assert_close(output.token_log_abs_det.sum(dim=1), output.log_abs_det, atol=1e-12)
    assert_differs(output.token_log_abs_det[:, 0], output.token_log_abs_det[:, 1])
    assert model(sample, torch.tensor([1, 2]), inverse=inverse).token_log_abs_det is None


# Swaps


def test_a_swap_to_the_same_class_returns_the_image(pipe):
    images = random_images(3)
    for labels in ([2, 0, 4], "cat", -1, None):
        swapped = pipe.swap_class(images, labels, labels, guidance_scale=1.0, output_type="latent").images
        assert_close(swapped, pipe.encode(images))


def test_a_swap_samples_the_target_from_the_latents_of_the_source(pipe):
    images, latents = random_images(2), pipe.invert(random_images(2), ["cat", "ant"])
    swapped = pipe.swap_class(images, ["cat", "ant"], "dog", output_type="latent").images
    expected = pipe([3, 3], latents=latents, denoise=False, output_type="latent").images  # the pipeline's guidance
    assert_close(swapped, expected)
    assert_differs(swapped, pipe.encode(images))
    unguided = pipe.swap_class(images, ["cat", "ant"], "dog", guidance_scale=1.0, output_type="latent").images
    assert_differs(unguided, swapped)
    denoised = pipe.swap_class(images, ["cat", "ant"], "dog", denoise=True, output_type="latent").images
    assert_close(denoised, pipe([3, 3], latents=latents, output_type="latent").images)
    assert_differs(denoised, swapped)


def test_swaps_and_variations_of_a_latent_flow(latent_pipe):
    images = random_images(2, size=8)
    swapped = latent_pipe.swap_class(images, [0, 1], [1, 0]).images
    assert [image.size for image in swapped] == [(8, 8)] * 2
    same = latent_pipe.swap_class(images, 3, 3, guidance_scale=1.0, output_type="latent").images
    assert_close(same, latent_pipe.encode(images))
    unchanged = latent_pipe.vary(images, 0, 3, output_type="latent").images
    assert_close(unchanged, latent_pipe.encode(images))


# Variations


def test_strength_0_returns_the_image_and_1_a_new_sample(pipe):
    images = random_images(2)
    unchanged = pipe.vary(images, 0, [1, 2], generator=seeded(), output_type="latent").images
    assert_close(unchanged, pipe.encode(images))
    replaced = pipe.vary(images, 1, [1, 2], generator=seeded(), output_type="latent").images
    assert_close(replaced, pipe([1, 2], generator=seeded(), **EXACT).images)


def test_a_variation_mixes_latents_and_noise_and_keeps_their_variance(pipe):
    images = random_images(2)
    varied = pipe.vary(images, 0.6, [1, 2], num_images_per_prompt=2, generator=seeded(), output_type="latent").images
    noise = pipe.prepare_latents(4, seeded())
    expected = 0.8 * pipe.invert(images, [1, 2]).repeat_interleave(2, dim=0) + 0.6 * noise
    assert_close(pipe.transformer(varied, torch.tensor([1, 1, 2, 2])).sample, expected)


def test_variations_without_a_class_and_with_a_generator_each(pipe, unconditional_pipe):
    generators = [seeded(seed) for seed in range(4)]
    for pipeline in (pipe, unconditional_pipe):
        varied = pipeline.vary(random_images(2), num_images_per_prompt=2, generator=generators, output_type="latent")
        assert varied.images.shape == (4, 3, 4, 4) and (varied.images[0] - varied.images[1]).abs().max() > 1e-2


# Interpolation


@pytest.mark.parametrize("labels", [["cat", "eel"], [3, -1], 2, None], ids=["two", "one without", "one", "none"])
def test_interpolation_ends_at_the_images(pipe, labels):
    image_a, image_b = random_images(2)
    between = pipe.interpolate(image_a, image_b, 5, labels, output_type="latent").images
    assert between.shape == (5, 3, 4, 4)
    assert_close(between[[0, -1]], pipe.encode(torch.stack([image_a, image_b])))
    assert_differs(between[2], between[1])


def test_interpolation_blends_latents_on_a_sphere_and_class_weights(pipe):
    images = random_images(2)
    between = pipe.interpolate(*images, 5, [3, 1], output_type="latent").images
    fractions = torch.linspace(0, 1, 5, dtype=torch.float64)
    weights = torch.zeros(5, NUM_CLASSES, dtype=torch.float64)
    weights[:, 3], weights[:, 1] = 1 - fractions, fractions
    latents = pipe.transformer(between, weights).sample
    assert_close(latents, slerp(*pipe.invert(images, [3, 1]), fractions))


def test_interpolation_of_a_latent_flow(latent_pipe):
    image_a, image_b = random_images(2, size=8)
    between = latent_pipe.interpolate(image_a, image_b, 3, [0, 4], output_type="latent").images
    assert_close(between[[0, -1]], latent_pipe.encode(torch.stack([image_a, image_b])))


def test_slerp_moves_at_constant_speed_on_the_sphere_and_linearly_in_norm():
    start, end = torch.randn(2, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    end = 2 * end
    points = slerp(start, end, torch.linspace(0, 1, 9, dtype=torch.float64)).flatten(1)
    assert_close(points[0], start.flatten(), atol=1e-12)
    assert_close(points[-1], end.flatten(), atol=1e-12)
    assert_close(points.norm(dim=1).diff(), points.norm(dim=1).diff().mean().expand(8), atol=1e-12)
    directions = torch.nn.functional.normalize(points, dim=1)
    cosines = (directions[1:] * directions[:-1]).sum(dim=1)
    assert_close(cosines, cosines.mean().expand(8), atol=1e-12)
    total = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0).acos()
    assert_close(cosines.acos().sum(), total, atol=1e-9)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, 0.0], ids=["equal", "same direction", "opposite", "zero"])
def test_slerp_of_directions_without_one_arc(factor):
    start = torch.randn(3, 4, 4, generator=seeded())
    points = slerp(start, factor * start, torch.linspace(0, 1, 4))
    assert points.isfinite().all()
    torch.testing.assert_close(points[0], start)
    torch.testing.assert_close(points[-1], factor * start)


# What all of them share


def edit(pipeline, name: str, images, **options):
    """A call of a method that needs no more than two images."""
    if name == "interpolate":
        return pipeline.interpolate(images[0], images[1], 3, **options)
    return getattr(pipeline, name)(images, *((1, 2) if name == "swap_class" else ()), **options)


EDITS = ["swap_class", "interpolate", "vary"]
METHODS = [*EDITS, "invert", "likelihood_map"]


@pytest.mark.parametrize("name", EDITS)
def test_edits_return_what_a_call_returns(pipe, name):
    images, steps = list(random_images(2)), []
    options = {"generator": seeded()} if name == "vary" else {}

    def callback(pipeline, step, block, tensors):
        steps.append(block)
        return {}

    output = edit(pipe, name, images, callback_on_step_end=callback, **options)
    assert all(isinstance(image, PIL.Image.Image) for image in output.images) and steps == [3, 2, 1]
    options = {"generator": seeded()} if name == "vary" else {}
    options |= {"output_type": "np", "return_dict": False, "solver": "jacobi", "tolerance": 0.0}
    (arrays,) = edit(pipe, name, images, **options)
    assert np.abs(arrays - np.stack([np.asarray(image) / 255 for image in output.images])).max() < 0.5 / 255 + 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_threads_edit_what_each_call_edits_alone(pipe, name):
    calls = [random_images(2, seed=seed) for seed in range(4)]
    seeds = {"generator"} if name == "vary" else set()

    def run(images):
        options = {"generator": seeded(5)} if seeds else {}
        if name in EDITS:
            return edit(pipe, name, list(images), output_type="latent", guidance_scale=1.5, **options).images
        return edit(pipe, name, images, class_labels=[1, 2])

    alone = [run(images) for images in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, calls))
    assert all(torch.equal(first, second) for first, second in zip(alone, together))


# Bad inputs


def refused(match: str, function, *args, **options):
    with pytest.raises(ValueError, match=match):
        function(*args, **options)


@pytest.mark.parametrize("name", METHODS)
def test_images_that_cannot_be_used_raise(pipe, name, tmp_path):
    images = list(random_images(2))
    images[1] = images[1].clone()
    images[1][0, 0, 0] = math.nan
    refused("Image 1 must hold floats in", edit, pipe, name, images)
    (tmp_path / "text.png").write_text("no image")
    refused("Image 1, '.*text.png', cannot be read", edit, pipe, name, [images[0], tmp_path / "text.png"])


def test_labels_that_do_not_fit_raise(pipe, unconditional_pipe):
    images = random_images(2)
    three = r"must be one label for all images, or one for each of the 2 images, but holds 3"
    refused(f"`class_labels` {three}", pipe.invert, images, [1, 2, 3])
    refused(f"`class_labels` {three}", pipe.likelihood_map, images, [1, 2, 3])
    refused(f"`class_labels` {three}", pipe.vary, images, 0.5, [1, 2, 3])
    refused(f"`class_labels` {three}", pipe.interpolate, *images, 4, [1, 2, 3])
    refused(f"`source` {three}", pipe.swap_class, images, [1, 2, 3], 1)
    refused(f"`target` {three}", pipe.swap_class, images, 1, torch.eye(NUM_CLASSES)[:3])
    refused("`target` must lie between 0 and 4, or be -1 for no class, but one is 5", pipe.swap_class, images, 0, 5)
    refused("`source` must be known names or numbers, but 'cow' is not one", pipe.swap_class, images, "cow", 0)
    refused("`target` must be whole numbers or names, but one is 1.5", pipe.swap_class, images, 0, 1.5)
    refused("`target` must name at least one class", pipe.swap_class, images, 0, [])
    refused("`source` must be None for an unconditional model", unconditional_pipe.swap_class, images, 0, 1)
    refused("`class_labels` must be None for an unconditional", unconditional_pipe.invert, images, torch.ones(2, 5))


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, None, "0.5", True])
def test_strengths_outside_0_to_1_raise(pipe, strength):
    message = r"`strength` must be a finite number of at least 0\.0 and at most 1\.0"
    refused(message, pipe.vary, random_images(2), strength)


@pytest.mark.parametrize("num_steps", [1, 0, 2.5, None])
def test_fewer_than_two_steps_raise(pipe, num_steps):
    refused("`num_steps` must be a whole number of at least 2", pipe.interpolate, *random_images(2), num_steps)


def test_interpolation_takes_one_image_at_each_end(pipe):
    images = random_images(2)
    refused("`image_a` must be one image, but is of type Tensor", pipe.interpolate, images, images[0])
    refused("`image_b` must be one image, but is of type list", pipe.interpolate, images[0], [images[1]])


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": -0.5}, "`guidance_scale` must be a finite number of at least 0.0"),
        ({"guidance_rule": "both"}, "`guidance_rule` must be one of"),
        ({"guidance_schedule": "none"}, "`guidance_schedule` must be one of"),
        ({"guidance_temperature": 0}, "`guidance_temperature` must be a finite number above 0.0"),
        ({"solver": "newton"}, "`solver` must be one of"),
        ({"tolerance": -1}, "`tolerance` must be a finite number of at least 0.0"),
        ({"output_type": "jpeg"}, "`output_type` must be one of"),
        ({"on_overflow": "hide"}, "`on_overflow` must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_of_a_call_are_checked_before_images_are_read(pipe, name, options, message):
    refused(message, edit, pipe, name, ["no such file", "no such file"], **options)


def test_generators_that_do_not_fit_raise(pipe):
    images = random_images(2)
    message = "`generator` must be one generator, or a list of one for each of the 4 images, but has 2"
    refused(message, pipe.vary, images, 0.5, 1, num_images_per_prompt=2, generator=[seeded(), seeded()])
    refused("`generator` must be a `torch.Generator`", pipe.invert, images, 1, add_noise=True, generator=7)
    refused("`num_images_per_prompt` must be a whole number", pipe.vary, images, 0.5, 1, num_images_per_prompt=0)
