import json

import pytest
import torch

from flowback_hf import FlowBackPipeline, TarFlowReverseTransformer2DModel

from ..conftest import randomise_weights


@pytest.fixture
def script(benchmark_script):
    return benchmark_script("learned_evaluations")


def test_with_as_many_sweeps_as_tokens_it_is_the_exact_sampler(script, randomised_model):
    pipe = FlowBackPipeline(randomised_model(noise_std=0.1))
    noise, labels = torch.randn(2, *pipe.prepare_latents(1).shape[1:], dtype=torch.float64), torch.tensor([1, 0])
    num_tokens = pipe.transformer.patchify(noise).shape[1]
    exact = pipe.denoise(pipe.invert_blocks(noise, labels, 1.5, solver="sequential"), labels)
    swept = {number: script.invert_with_sweeps(pipe, noise, labels, 1.5, number) for number in (1, num_tokens - 1)}
    assert torch.allclose(swept[num_tokens - 1], exact, atol=1e-12)
    assert not torch.allclose(swept[1], exact, atol=1e-3)


def test_the_figure_and_the_report(script, demo, tmp_path):
    pipe = FlowBackPipeline.from_pretrained(demo / "flow")
    randomise_weights(pipe.transformer, seed=0)
    reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(pipe.transformer, max_guidance_scale=2.0)
    randomise_weights(reverse_transformer, seed=1)
    pipe.register_modules(reverse_transformer=reverse_transformer)
    pipe.save_pretrained(tmp_path / "learned")
    line = ["--model", str(tmp_path / "learned"), "--data_dir", str(demo / "data"), "--num_samples", "6"]
    line += ["--sweeps", "1", "3", "--batch_size", "4", "--figure", str(tmp_path / "figures" / "evaluations.png")]
    line += ["--output", str(tmp_path / "results.json")]
    with pytest.warns(UserWarning, match="covariance is singular"):
        script.main(script.parse_args(line), line)
    cases = json.loads((tmp_path / "results.json").read_text())["results"]["cases"]
    assert [(case["sampler"], case["num_evaluations"]) for case in cases] == [
        ("learned", 1),
        ("1 sweeps", 2),
        ("3 sweeps", 4),
    ]
    assert {case["num_images"] for case in cases} == {6}
    assert len({case["frechet_distance"] for case in cases}) == 3
    assert (tmp_path / "figures" / "evaluations.png").stat().st_size > 0
