import json

import pytest
import torch

from ..conftest import REPOSITORY


@pytest.fixture
def benchmarks(benchmark_script):
    return {name: benchmark_script(name) for name in ("flow_costs", "latent_train_step")}


def test_the_committed_sizes_are_counted_ones(benchmark_script):
    report = json.loads((REPOSITORY / "benchmarks" / "results" / "model_sizes.json").read_text())
    sizes = {result["config"]: result for result in report["results"]}
    model_sizes, flow_costs = benchmark_script("model_sizes"), benchmark_script("flow_costs")
    assert sizes.keys() == {path.stem for path in flow_costs.CONFIGS.glob("*.json")}
    for name, result in sizes.items():
        if name.startswith("demo"):
            assert model_sizes.count(name) == result
        assert flow_costs.count_parameters(flow_costs.load_config(name)) == result["parameters"]


def test_flops_are_those_of_the_products_written_out(benchmarks):
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 3, "num_blocks": 3, "num_layers": [1, 1, 4],
        "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2.0, "num_classes": 7,
    }  # fmt: skip
    tokens, token_dim, width, layers = 16, 12, 32, 6
    projections = 3 * (token_dim * width + width * 2 * token_dim)
    products = layers * (width * 3 * width + width * width + 2 * width * 2 * width)
    attention = layers * 2 * tokens * width  # q k^T and the weighted sum of v, for one token
    assert benchmarks["flow_costs"].count_flops(config) == 2 * tokens * (projections + products + attention)


def test_memory_and_time_by_arithmetic(benchmarks, tmp_path, capsys, monkeypatch):
    script = benchmarks["latent_train_step"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    predictions = {}
    for flags in ((), ("--gradient_checkpointing",), ("--batch_size", "64")):
        script.main(["--configs", "demo_shapes", "--output", str(tmp_path / "report.json"), *flags])
        (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
        assert result["measured"] is None
        predictions[flags] = result["predicted"]
    assert "memory and time were not measured" in capsys.readouterr().out
    assert "| not measured | not measured |" in (tmp_path / "report.md").read_text()

    plain, checkpointed, twice = predictions.values()
    assert plain["states_gib"] * script.GIB == 20 * plain["parameters"]
    assert checkpointed["activations_gib_per_image"] < plain["activations_gib_per_image"] / 3
    assert checkpointed["seconds"] == pytest.approx(plain["seconds"] * 4 / 3)
    assert twice["seconds"] == pytest.approx(2 * plain["seconds"])
    more = 32 * plain["activations_gib_per_image"]
    assert twice["memory_gib"] == pytest.approx(plain["memory_gib"] + more)


def test_saved_bytes_are_what_autograd_saves(benchmarks):
    """Counted without allocating anything, and on real tensors: by the storages that saving them keeps alive."""
    flow_costs = benchmarks["flow_costs"]
    config = flow_costs.load_config("demo_digits")
    objective = flow_costs.make_objective(config)
    sizes, kept = {}, []

    def remember(tensor):
        kept.append(tensor)
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        objective(*flow_costs.make_batch(config, 2, "cpu"))
    assert flow_costs.saved_bytes(config, 2) == pytest.approx(sum(sizes.values()), rel=0.02)
