import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowback_hf import FlowBackPipeline


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SAMPLERS = ["published loop", "GS-Jacobi", "SeJD", "sequential", "auto"]


@pytest.fixture
def saved_flow(randomised_model, tmp_path):
    # Smaller output weights than a trained flow's, so that rounding in float32 is not amplified.
    model = randomised_model(sample_size=8, num_blocks=2).float()
    FlowBackPipeline(model).save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


@pytest.fixture
def tiny_options(saved_flow, tmp_path):
    output = tmp_path / "new_folder" / "sampling.json"
    return ["--model", str(saved_flow), "--repeats", "2", "--threads", "1", "--output", str(output)], output


def noise(model, batch_size=3):
    size = model.config.sample_size
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("num_layers", [1, [2, 1, 1, 2]], ids=["even", "deep-shallow"])
def test_baselines_give_what_the_solver_gives(benchmark_script, randomised_model, num_layers, guidance_scale):
    baselines = benchmark_script("baselines")
    model = randomised_model(sample_size=6, num_blocks=4, num_layers=num_layers)
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    arguments = (model, latents, class_labels, guidance_scale)
    solved = model(latents, class_labels, inverse=True, solver="sequential", guidance_scale=guidance_scale).sample
    assert (solved - latents).abs().max() > 0.1

    recipes = [baselines.calibrate_gs_jacobi(*arguments, tolerance=1e-13, num_modules=3)]
    recipes += [baselines.GSJacobiRecipe([1, 3, 8, 2], [True, False, True, False])]
    results = [baselines.published_token_loop(*arguments)]
    results += [baselines.selective_jacobi_decoding(*arguments, tolerance=1e-13)]
    results += [baselines.gs_jacobi(*arguments, tolerance=1e-13, recipe=recipe) for recipe in recipes]
    for result in results:
        torch.testing.assert_close(result, solved, rtol=0, atol=1e-10)
        assert not result.requires_grad
    assert sorted(recipes[0].num_modules) == [1, 1, 1, 3]


@pytest.mark.parametrize("guidance_scale, calls_per_token", [(1.0, 1), (2.5, 2)])
def test_baseline_calls_the_two_branches_apart(benchmark_script, randomised_model, guidance_scale, calls_per_token):
    model = randomised_model(sample_size=6)  # nine tokens, of which the last is not evaluated
    latents, batch_sizes = torch.zeros(2, 3, 6, 6, dtype=torch.float64), []
    for block in model.blocks:
        block.proj_in.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
    benchmark_script("baselines").published_token_loop(model, latents, torch.tensor([2, 4]), guidance_scale)
    assert batch_sizes == [2] * (3 * 8 * calls_per_token)


def test_jacobi_baselines_stop_at_their_tolerance(benchmark_script, randomised_model):
    baselines = benchmark_script("baselines")
    model = randomised_model(sample_size=8)
    arguments, evaluations = (model, noise(model), torch.tensor([2, -1, 4]), 1.0), []
    for block in model.blocks:
        block.proj_in.register_forward_hook(lambda module, args, output: evaluations.append(output.shape[1]))
    counts = {}
    for tolerance in (1e-1, 1e-12):
        recipe = baselines.GSJacobiRecipe([1, 1, 3], [False] * 3)
        baselines.gs_jacobi(*arguments, tolerance=tolerance, recipe=recipe)
        counts["GS-Jacobi", tolerance] = len(evaluations)
        evaluations.clear()
        baselines.selective_jacobi_decoding(*arguments, tolerance=tolerance)
        assert evaluations[:15] == [1] * 15  # the block next to the noise, token by token
        counts["SeJD", tolerance] = len(evaluations)
        evaluations.clear()
    for name in ("GS-Jacobi", "SeJD"):
        assert counts[name, 1e-1] < counts[name, 1e-12]


def test_benchmark_writes_its_times_and_the_machine(tiny_options):
    options, output = tiny_options
    script = [sys.executable, str(BENCHMARKS / "sampling.py")]
    run = subprocess.run(
        [*script, *options, "--batch_sizes", "1", "3"], check=True, capture_output=True, text=True, timeout=300
    )
    report = json.loads(output.read_text())
    settings = [(result["guidance_scale"], result["batch_size"]) for result in report["results"]["sampling"]]
    assert settings == [(1.0, 1), (1.0, 3), (2.0, 1), (2.0, 3)]
    for result in report["results"]["sampling"]:
        assert list(result["samplers"]) == SAMPLERS
        baseline = result["samplers"]["published loop"]["median_seconds"]
        for timing in result["samplers"].values():
            assert 0 <= timing["residual"] <= 1e-3 and timing["difference_from_published_loop"] <= 1e-3
            assert 0 < timing["min_seconds"] <= timing["median_seconds"] <= timing["max_seconds"]
            assert timing["times_faster_than_published_loop"] == pytest.approx(baseline / timing["median_seconds"])
    # The floor: operations grow with the rows, bytes do not.
    (one, three, one_guided, three_guided) = [result["floor"] for result in report["results"]["sampling"]]
    assert three["operations"] == pytest.approx(3 * one["operations"])
    assert three_guided["operations"] == pytest.approx(6 * one["operations"])
    assert three_guided["bandwidth"] == one["bandwidth"] > 0
    memory = report["results"]["memory"]
    # Rows, keys and values, tokens, width, layers, bytes.
    assert memory["cache_bytes"] == 6 * 2 * 16 * 8 * 1 * 4
    assert all(peak > memory["cache_bytes"] for peak in memory["peak_bytes"].values())
    assert report["machine"].keys() == {"cpu", "cores", "threads", "torch", "python"}
    assert report["machine"]["threads"] == 1 and report["machine"]["torch"] == torch.__version__
    assert report["command"].startswith("python benchmarks/sampling.py --model ")

    table = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert table[0] == f"| batch | guidance | {' | '.join(SAMPLERS)} | floor |"
    assert table[6] == f"| batch | guidance | {' | '.join(SAMPLERS)} |"  # residuals
    for rows in (table[2:6], table[8:12]):
        assert [re.match(r"\| (\d+) \| (\d)", line).groups() for line in rows] == [
            ("1", "1"), ("3", "1"), ("1", "2"), ("3", "2"),
        ]  # fmt: skip
    written = output.with_suffix(".md").read_text()
    assert "\n".join(table[:6]) in written and report["command"] in written
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_compiled_rows_are_of_a_compiled_copy(benchmark_script, monkeypatch, tiny_options):
    sampling = benchmark_script("sampling")
    options, output = tiny_options
    compiled = []

    def compile_without_code_generation(pipe):
        compiled.append(pipe.transformer)
        pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(sampling.FlowBackPipeline, "compile", compile_without_code_generation)
    torch.compiler.reset()
    sampling.main([*options, "--batch_sizes", "2", "--guidance_scales", "2", "--compile"])
    torch.compiler.reset()
    (result,) = json.loads(output.read_text())["results"]["sampling"]
    assert list(result["samplers"]) == [*SAMPLERS, "sequential, compiled", "auto, compiled"]
    assert len(compiled) == 1 and all(block.steps_are_compiled for block in compiled[0].blocks)
    assert compiled[0].config.inverse_profile["guidance_scale"] == 2.0


@pytest.mark.parametrize("wrong", ["GS-Jacobi", "auto"])
@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_benchmark_refuses_to_time_wrong_results(benchmark_script, monkeypatch, tiny_options, wrong, error):
    sampling = benchmark_script("sampling")
    options, output = tiny_options
    build_samplers = sampling.build_samplers

    def build_one_wrong(*args):
        samplers = build_samplers(*args)
        right = samplers[wrong]
        return samplers | {wrong: lambda *inputs: right(*inputs) + error}

    monkeypatch.setattr(sampling, "build_samplers", build_one_wrong)
    with pytest.raises(
        SystemExit, match=rf"residual of {wrong}'s samples is (\d\.\d\de-0\d|nan) at batch size 1, more than 1e-02"
    ) as refusal:
        sampling.main([*options, "--batch_sizes", "1"])
    assert isinstance(refusal.value.code, str)  # which makes the exit status 1
    assert not output.parent.exists()


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--batch_sizes", "1", "0"]])
def test_benchmark_refuses_counts_below_one(benchmark_script, saved_flow, capsys, options):
    with pytest.raises(SystemExit):
        benchmark_script("sampling").parse_args(["--model", str(saved_flow), *options])
    assert "--repeats and --batch_sizes must be at least 1" in capsys.readouterr().err


def test_benchmark_says_how_to_make_its_flow(benchmark_script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark_script("sampling").parse_args(["--model", str(tmp_path)])
    assert "run benchmarks/prepare_flow.py" in capsys.readouterr().err


def test_flow_is_made_once_and_kept(benchmark_script, tmp_path):
    prepare_flow = benchmark_script("prepare_flow")
    args = prepare_flow.parse_args(["--output_dir", str(tmp_path), "--max_train_steps", "300"])
    prepare, train = prepare_flow.commands(args)
    assert prepare[1].endswith("prepare_demo.py") and train[1].endswith("train_rra.py")
    assert train[train.index("--max_train_steps") + 1] == "300"
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "demo.json").touch()
    assert prepare_flow.commands(args) == [train]
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "model_index.json").touch()
    assert prepare_flow.commands(args) == []


def test_cold_starts_are_timed_in_new_processes(benchmark_script, monkeypatch, tiny_options, capsys):
    sampling = benchmark_script("sampling")
    options, output = tiny_options
    monkeypatch.setattr(sampling, "COLD_SAMPLERS", ("published loop", "plain"))  # compiling takes long
    sampling.main([*options, "--cold", "--guidance_scales", "2", "--batch_sizes", "1", "2"])
    results = json.loads(output.read_text())["results"]
    cases = [(name, batch_size) for name in ("published loop", "plain") for batch_size in (1, 2)]
    assert [(result["sampler"], result["batch_size"]) for result in results] == cases
    for result in results:
        assert 0 < result["min_seconds"] <= result["median_seconds"] and 0 < result["first_seconds"]
        assert result["residual"] < 1e-2
    assert {result["times_faster_than_published_loop"] for result in results[:2]} == {1.0}
    assert capsys.readouterr().out.count("| plain |") == 2


def test_the_learned_inverse_is_timed_against_finished_samples(benchmark_script, monkeypatch, tiny_options, capsys):
    sampling = benchmark_script("sampling")
    options, output = tiny_options
    compiled = []
    monkeypatch.setattr(sampling.FlowBackPipeline, "compile", lambda pipe: compiled.append(pipe))  # takes long
    sampling.main([*options, "--learned", "--guidance_scales", "2", "--batch_sizes", "1", "3"])
    results = json.loads(output.read_text())["results"]
    assert results["num_parameters"]["learned"] == compiled[0].reverse_transformer.num_parameters()
    names = ["published loop", "auto", "auto, compiled", "learned", "learned, compiled", "forward pass"]
    assert [list(result["samplers"]) for result in results["sampling"]] == [names, names]
    for result in results["sampling"]:
        assert all(0 < timing["min_seconds"] <= timing["median_seconds"] for timing in result["samplers"].values())
    assert capsys.readouterr().out.count("| batch | guidance | published loop | auto |") == 1
    default = sampling.parse_args([*options[:-2], "--learned"]).output
    assert default.name == "sampling_learned.json"
    right = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *arguments: right(*arguments) + 0.1)
    with pytest.raises(SystemExit, match=r"residual of auto's samples is .*: times of wrong results are not compared"):
        sampling.main([*options, "--learned", "--guidance_scales", "2", "--batch_sizes", "1"])
