import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowback_hf import AlignedFlowObjective


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY_OPTIONS = (
    "--sample_size 8 --patch_size 4 --num_blocks 3 --num_layers 2 --num_attention_heads 2 --attention_head_dim 8"
    " --aligned_blocks 2 3 --aligned_layer 1 --teacher_dim 8 --projector_dim 8 --repeats 2 --threads 1 --modes eager"
).split()


@pytest.fixture
def setting(randomised_model):
    """A float64 objective of any order, and its batch: nine tokens, two aligned blocks and one that is not."""
    flow = randomised_model(sample_size=6, num_blocks=3, num_layers=2)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "noisy_sample": torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64),
        "class_labels": torch.tensor([3, -1]),
        "teacher_features": torch.randn(2, 9, 5, generator=generator, dtype=torch.float64),
    }

    def build(order):
        torch.manual_seed(0)
        places = [(2, 1), (2, 2), (3, 1)]
        return AlignedFlowObjective(flow, places=places, order=order, teacher_dim=5, projector_dim=6).double()

    return build, batch


@pytest.mark.parametrize(
    "baseline, order",
    [("two_evaluation_loss", 0), ("two_evaluation_loss", 2), ("sequential_loss", "exact")],
)
def test_baselines_have_the_loss_and_the_gradient_of_the_package(benchmark_script, setting, baseline, order):
    build, batch = setting
    objective = build(order)
    parameters = list(objective.parameters())
    loss = getattr(benchmark_script("alignment_baselines"), baseline)(objective, **batch)
    expected = objective(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for actual, gradient in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-9 * gradient.abs().max().item())


def test_benchmark_writes_every_step_with_time_and_memory(tmp_path):
    output = tmp_path / "train_step.json"
    options = [*TINY_OPTIONS, "--patch_size", "1", "--batch_size", "4", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "train_step.py"), *options], check=True, capture_output=True, text=True
    )
    report = json.loads(output.read_text())
    steps = {step["step"]: step for step in report["results"]["steps"]}
    assert len(steps) == 10 and report["command"].startswith("python benchmarks/train_step.py --sample_size 8 ")
    assert report["results"]["matrix_operations_per_second"] > 1e8
    for step in steps.values():
        assert 0 < step["min_seconds"] <= step["median_seconds"] <= step["max_seconds"]
    assert steps["none"]["times_none"] == steps["none"]["memory_times_none"] == 1
    assert steps["none"]["share_of_matrix_rate"] > 0
    # two evaluations hold two sets of activations, and the sequential graph one for each token
    assert steps["reverse 1, two evaluations"]["peak_bytes"] > 1.05 * steps["reverse 1"]["peak_bytes"]
    assert steps["reverse exact, sequential graph"]["peak_bytes"] > 1.05 * steps["reverse 1"]["peak_bytes"]
    assert "| eager | reverse 0, two evaluations |" in run.stdout
    assert "| eager | reverse 0, two evaluations |" in output.with_suffix(".md").read_text()


def test_memory_is_that_of_the_tensors_alive_at_once(benchmark_script):
    train_step = benchmark_script("train_step")
    layer = torch.nn.Linear(1000, 1000, bias=False)

    def step():
        layer(torch.ones(1, 1000)).sum().backward()
        return layer

    # the weights and their gradients, and a few vectors
    assert train_step.peak_memory(step, "cpu") == pytest.approx(8e6, rel=0.01)


def test_operations_are_counted_as_the_arithmetic_says(benchmark_script):
    train_step = benchmark_script("train_step")
    args = train_step.parse_args([*TINY_OPTIONS, "--batch_size", "5"])
    # of a token: linear layers of 12 width^2 a layer, two projections; attention to half of the four tokens
    weights = 3 * (2 * 12 * 16**2 + 48 * 16 + 16 * 96)
    attention = 3 * 2 * 2 * 4 * 16
    assert train_step.operations_per_step(train_step.build_flow(args), args) == 3 * 5 * 4 * (2 * weights + attention)


def test_only_blocks_below_the_aligned_ones_are_compiled_where_asked(benchmark_script):
    train_step = benchmark_script("train_step")
    args = train_step.parse_args(TINY_OPTIONS)
    for mode, expected in {"eager": 0, "compiled below": 1, "compiled": 3}.items():
        flow = train_step.build_flow(args)
        train_step.compile_layers(flow, args, mode)
        compiled = [all(layer._compiled_call_impl is not None for layer in block.layers) for block in flow.blocks]
        assert compiled == [number < expected for number in range(3)]


def test_different_gradients_are_not_compared(benchmark_script, monkeypatch, tmp_path):
    train_step = benchmark_script("train_step")
    right = train_step.BASELINES["two evaluations"]
    monkeypatch.setitem(train_step.BASELINES, "two evaluations", lambda *inputs: 1.01 * right(*inputs))
    with pytest.raises(SystemExit, match="'reverse 0' and 'reverse 0, two evaluations' differ by 1.00e-02, more than"):
        train_step.main([*TINY_OPTIONS, "--output", str(tmp_path / "train_step.json")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--repeats", "0"], "--repeats, --sequential_repeats and --batch_size must be at least 1"),
        (["--steps", "detach"], "--steps must name none, which the others are compared with"),
    ],
)
def test_bad_arguments(benchmark_script, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark_script("train_step").parse_args(options)
    assert message in capsys.readouterr().err
