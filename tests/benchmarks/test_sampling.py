import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY_OPTIONS = (
    "--sample_size 8 --patch_size 4 --num_blocks 2 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
    " --repeats 2 --threads 1"
).split()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("num_layers", [1, [2, 1, 1, 2]], ids=["even", "deep-shallow"])
def test_baseline_gives_what_the_solver_gives(benchmark_script, randomised_model, num_layers, guidance_scale):
    model = randomised_model(sample_size=6, num_blocks=4, num_layers=num_layers)
    latents = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    class_labels = torch.tensor([2, -1, 4])
    baseline = benchmark_script("baselines").published_token_loop(model, latents, class_labels, guidance_scale)
    solved = model(latents, class_labels, inverse=True, guidance_scale=guidance_scale).sample
    assert (solved - latents).abs().max() > 0.1
    torch.testing.assert_close(baseline, solved, rtol=0, atol=1e-10)
    assert not baseline.requires_grad


@pytest.mark.parametrize("guidance_scale, calls_per_token", [(1.0, 1), (2.5, 2)])
def test_baseline_calls_the_two_branches_apart(benchmark_script, randomised_model, guidance_scale, calls_per_token):
    model = randomised_model(sample_size=6)  # nine tokens, of which the last is not evaluated
    latents, batch_sizes = torch.zeros(2, 3, 6, 6, dtype=torch.float64), []
    for block in model.blocks:
        block.proj_in.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
    benchmark_script("baselines").published_token_loop(model, latents, torch.tensor([2, 4]), guidance_scale)
    assert batch_sizes == [2] * (3 * 8 * calls_per_token)


def test_benchmark_writes_its_times_and_the_machine(tmp_path):
    output = tmp_path / "new_folder" / "sampling.json"
    options = [*TINY_OPTIONS, "--batch_sizes", "1", "3", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "sampling.py"), *options], check=True, capture_output=True, text=True
    )
    report = json.loads(output.read_text())
    assert [result["batch_size"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        assert result.keys() == {"batch_size", "max_difference", "baseline", "sequential"}
        assert 0 <= result["max_difference"] <= 1e-4
        for name in ("baseline", "sequential"):
            timing = result[name]
            assert 0 < timing["min_seconds"] <= timing["median_seconds"] <= timing["max_seconds"]
        ratio = result["baseline"]["median_seconds"] / result["sequential"]["median_seconds"]
        assert result["sequential"]["times_faster_than_baseline"] == pytest.approx(ratio)
    assert report["machine"].keys() == {"cpu", "cores", "threads", "torch", "python"}
    assert report["machine"]["threads"] == 1
    assert report["machine"]["torch"] == torch.__version__
    assert report["command"].startswith("python benchmarks/sampling.py --sample_size 8 ")

    table = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert table[0] == "| batch size | baseline, s | sequential, s | ratio | max. difference |"
    assert [re.match(r"\| (\d+) \|", line).group(1) for line in table[2:]] == ["1", "3"]
    written = output.with_suffix(".md").read_text()
    assert "\n".join(table) in written
    assert report["command"] in written


def test_benchmarked_flow_moves_its_noise_and_its_classes_apart(benchmark_script):
    sampling = benchmark_script("sampling")
    args = sampling.parse_args(TINY_OPTIONS)
    latents, class_labels = sampling.draw_noise_and_labels(args, batch_size=2)
    sampled = sampling.build_samplers(args)["sequential"](latents, class_labels)
    unguided = sampling.build_samplers(sampling.parse_args([*TINY_OPTIONS, "--guidance_scale", "1"]))["sequential"]
    assert sampled.isfinite().all()
    assert (sampled - latents).abs().max() > 0.1
    # A difference that the refused one could not hide.
    assert (sampled - unguided(latents, class_labels)).abs().max() > 100 * sampling.LARGEST_DIFFERENCE


def test_compiled_row_is_of_a_compiled_copy(benchmark_script, monkeypatch, tmp_path):
    sampling = benchmark_script("sampling")
    torch.compiler.reset()
    compile_layers = sampling.TarFlowTransformer2DModel.compile_repeated_blocks
    compiled = []

    def compile_without_code_generation(model):
        compiled.append(model)
        compile_layers(model, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(sampling.TarFlowTransformer2DModel, "compile_repeated_blocks", compile_without_code_generation)
    output = tmp_path / "sampling.json"
    sampling.main([*TINY_OPTIONS, "--batch_sizes", "2", "--compile", "--output", str(output)])
    torch.compiler.reset()
    (result,) = json.loads(output.read_text())["results"]
    assert result.keys() == {"batch_size", "max_difference", "baseline", "sequential", "compiled"}
    assert len(compiled) == 1
    header = "| batch size | baseline, s | sequential, s | ratio | compiled, s | ratio | max. difference |"
    assert header in output.with_suffix(".md").read_text()


@pytest.mark.parametrize("wrong", ["baseline", "sequential"])
@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_benchmark_refuses_to_time_different_results(benchmark_script, monkeypatch, tmp_path, wrong, error):
    sampling = benchmark_script("sampling")
    samplers = sampling.build_samplers(sampling.parse_args(TINY_OPTIONS))
    right = samplers[wrong]
    samplers[wrong] = lambda *inputs: right(*inputs) + error
    monkeypatch.setattr(sampling, "build_samplers", lambda args: samplers)
    output = tmp_path / "sampling.json"
    with pytest.raises(
        SystemExit, match=r"differ by up to (1\.00e-03|nan) at batch size 1, more than 1e-04"
    ) as refusal:
        sampling.main([*TINY_OPTIONS, "--batch_sizes", "1", "--output", str(output)])
    assert isinstance(refusal.value.code, str)  # which makes the exit status 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--batch_sizes", "1", "0"]])
def test_benchmark_refuses_counts_below_one(benchmark_script, capsys, options):
    with pytest.raises(SystemExit):
        benchmark_script("sampling").parse_args(options)
    assert "--repeats and --batch_sizes must be at least 1" in capsys.readouterr().err
