from types import SimpleNamespace

import pytest
import torch

from flowback_hf import FlowBackPipeline, TarFlowReverseTransformer2DModel
from flowback_hf.alignment.reverse_objective import trajectory_of

from ..conftest import randomise_weights


@pytest.fixture
def script(benchmark_script):
    return benchmark_script("learned_guesses")


@pytest.fixture
def pipe(randomised_model):
    flow = randomised_model(noise_std=0.1).float()
    reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(flow, max_guidance_scale=2.0)
    reverse_transformer.add_heads()
    randomise_weights(reverse_transformer, seed=1)
    return FlowBackPipeline(flow, reverse_transformer=reverse_transformer.eval())


def knowing_heads(flow, error: float):
    """Estimates that differ from what the flow's blocks exchange by more from sample to sample."""

    def estimate(noise, class_labels, guidance_scale=1.0, output_trajectory=True):
        exact = flow(noise, class_labels, inverse=True, solver="sequential").sample
        trajectory = trajectory_of(flow, exact, class_labels)
        generator = torch.Generator().manual_seed(1)
        sizes = error * torch.arange(len(noise), dtype=noise.dtype).view(-1, 1, 1, 1)
        return SimpleNamespace(
            trajectory=[each + sizes * torch.randn(each.shape, generator=generator) for each in trajectory]
        )

    return estimate


def with_heads(pipe, estimate):
    return SimpleNamespace(
        transformer=pipe.transformer,
        reverse_transformer=estimate,
        config=pipe.config,
        prepare_latents=pipe.prepare_latents,
    )


def test_the_rank_correlation(script):
    values = torch.tensor([1.0, 20.0, 3.0, 4.0])
    assert script.rank_correlation(values, values**3) == pytest.approx(1)
    assert script.rank_correlation(values, -values) == pytest.approx(-1)
    assert script.rank_correlation(values, torch.tensor([1.0, 4.0, 3.0, 2.0])) == pytest.approx(0.8)


def test_who_knows_the_answer_settles_at_once(script, pipe):
    arguments = {"batch_size": 3, "guidance_scale": 1.0, "tolerance": 1e-2}
    known = with_heads(pipe, knowing_heads(pipe.transformer, error=0.0))
    num_blocks = pipe.transformer.config.num_blocks
    assert script.count_sweeps(known, "heads", **arguments) == num_blocks
    assert script.count_sweeps(known, "latents", **arguments) > num_blocks


def test_the_certificate_grows_with_the_error(script, pipe):
    heads = with_heads(pipe, knowing_heads(pipe.transformer, error=1e-2))
    assert script.judge_certificate(heads, 20)["rank_correlation"] > 0.8


def test_the_report(script, pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "learned")
    line = ["--model", str(tmp_path / "learned"), "--num_samples", "12", "--batch_size", "2", "--tolerances", "0.01"]
    line += ["--guidance_scales", "2", "--output", str(tmp_path / "results.json")]
    script.main(script.parse_args(line), line)
    assert "rank correlation within classes" in (tmp_path / "results.md").read_text()
    assert "| 2 | 0.01 |" in capsys.readouterr().out
