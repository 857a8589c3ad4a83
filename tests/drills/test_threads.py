"""Several threads, one pipeline: each call gives what it gives alone, to the bit."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline, TarFlowTransformer2DModel


NUM_CLASSES = 4
ROUNDS = [pytest.param(1, id="short"), pytest.param(40, id="long", marks=pytest.mark.drill)]


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    flow = TarFlowTransformer2DModel(
        sample_size=4, patch_size=1, num_blocks=3, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_classes=NUM_CLASSES,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in flow.parameters():  # an untrained flow is the identity, which guidance does not change
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline = FlowBackPipeline(flow)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_options(generator: random.Random) -> dict:
    return {
        "class_labels": [generator.randrange(-1, NUM_CLASSES) for _ in range(generator.randint(1, 3))],
        "guidance_scale": generator.choice([1.0, 1.5, 2.0, 3.0, 4.0]),
        "guidance_rule": generator.choice(["linear", "product"]),
        "guidance_schedule": generator.choice(["constant", "linear"]),
        "guidance_temperature": generator.choice([1.0, 1.5]),
        "solver": generator.choice(["auto", "sequential", "jacobi"]),
        "tolerance": generator.choice([None, 0.0]),
        "denoise": generator.random() < 0.5,
        "output_type": generator.choice(["latent", "pt"]),
        "seed": generator.randrange(100),
    }


def sample(pipeline, seed: int, callback=None, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**options, generator=generator, callback_on_step_end=callback).images


@pytest.mark.parametrize("rounds", ROUNDS)
def test_threads_sample_what_each_call_samples_alone(pipeline, rounds, drill):
    generator = random.Random(0)
    for _ in range(rounds):
        calls = [random_options(generator) for _ in range(6)]
        alone = [sample(pipeline, **options) for options in calls]
        # The calls meet after every flow block, so that none runs through before the others begin.
        barrier = threading.Barrier(len(calls), timeout=60)

        def meet(pipe, step, block, tensors, barrier=barrier):
            barrier.wait()

        with ThreadPoolExecutor(len(calls)) as threads:
            together = list(threads.map(lambda options: sample(pipeline, callback=meet, **options), calls))
        for options, one, other in zip(calls, alone, together):
            assert one.isfinite().all() and torch.equal(one, other), options
        drill("Threads that sample with one pipeline", calls=len(calls), other_images=0)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_threads_classify_as_each_call_alone(pipeline, rounds, drill):
    classifier = FlowBackClassificationPipeline.from_pipe(pipeline)
    classifier.set_progress_bar_config(disable=True)
    generator = random.Random(0)

    def scores(call: tuple) -> torch.Tensor:
        images, options, seed = call
        return classifier.class_scores(images, generator=torch.Generator().manual_seed(seed), **options)

    for _ in range(rounds):
        calls = [
            (
                torch.rand(generator.randint(1, 3), 3, 4, 4, generator=torch.Generator().manual_seed(number)),
                {"method": method, "num_noise_draws": generator.randrange(3), "batch_size": generator.randint(1, 4)},
                generator.randrange(100),
            )
            for number, method in enumerate(["shortlist", "bayes", "gradient", "ascent"])
        ]
        alone = [scores(call) for call in calls]
        with ThreadPoolExecutor(len(calls)) as threads:
            together = list(threads.map(scores, calls))
        for call, one, other in zip(calls, alone, together):
            assert torch.equal(one, other), call[1]
        drill("Threads that classify with one pipeline", calls=len(calls), other_scores=0)


def test_a_callback_asks_and_stops_its_own_call(pipeline):
    scales, barrier = [1.0, 2.0, 3.0], threading.Barrier(3, timeout=60)
    seen = {scale: [] for scale in scales}

    def run(scale: float):
        def callback(pipe, step, block, tensors):
            if step == 0:
                barrier.wait()  # all calls run
                pipe._interrupt = scale == 2.0
                barrier.wait()
            seen[scale].append((pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt))

        sample(pipeline, 0, callback, class_labels=[1], guidance_scale=scale)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, scales))
    assert seen == {scale: [(scale, 3, scale == 2.0)] * (1 if scale == 2.0 else 3) for scale in scales}


def test_a_single_caller_is_stopped_and_guided_from_elsewhere(pipeline):
    """The thread of a page's button, and a callback that knows the pipeline by another name."""
    steps = []

    def callback(pipe, step, block, tensors):
        steps.append(step)
        pipeline._guidance_scale = 1.0 + step
        button = threading.Thread(target=setattr, args=(pipeline, "_interrupt", step == 1))
        button.start()
        button.join()

    sample(pipeline, 0, callback, class_labels=[1], guidance_scale=2.0)
    assert steps == [0, 1]
    assert (pipeline.guidance_scale, pipeline.interrupt, pipeline.num_timesteps) == (2.0, True, 3)
    sample(pipeline, 0, class_labels=[1], guidance_scale=3.0)
    assert (pipeline.guidance_scale, pipeline.interrupt) == (3.0, False)


def test_a_callback_may_call_the_pipeline(pipeline):
    seen = []

    def callback(pipe, step, block, tensors):
        sample(pipe, 1, class_labels=[0], guidance_scale=4.0)
        seen.append(pipe.guidance_scale)

    options = {"class_labels": [1], "guidance_scale": 2.0, "output_type": "latent"}
    result = sample(pipeline, 0, callback, **options)
    assert seen == [2.0] * 3
    assert torch.equal(result, sample(pipeline, 0, **options))
