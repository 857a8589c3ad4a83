"""The benchmark of a training step of the learned inverse."""

import json

import torch


SIZES = "--sample_size 8 --patch_size 4 --num_blocks 2 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"


def test_every_step_trains_and_is_written_with_time_and_memory(benchmark_script, tmp_path, capsys):
    script = benchmark_script("reverse_step")
    line = [*SIZES.split(), "--batch_size", "3", "--repeats", "1", "--output", str(tmp_path / "reverse_step.json")]
    steps = script.build_steps(script.parse_args(line))
    for step in steps.values():
        before = [weight.detach().clone() for weight in step.objective.parameters()]
        step()
        pairs = zip(before, step.objective.parameters())
        changed = {weight.requires_grad for old, weight in pairs if not torch.equal(old, weight)}
        assert changed == {True}
    unguided, guided = (step.compute_loss().item() for step in list(steps.values())[1:])
    assert unguided != guided

    script.main(line)
    results = json.loads((tmp_path / "reverse_step.json").read_text())["results"]
    assert [result["step"] for result in results] == list(steps)
    for result, step in zip(results, steps.values()):
        assert 0 < result["min_seconds"] <= result["median_seconds"] and 0 < result["times_flow"]
        trained = sum(weight.numel() for weight in step.objective.parameters() if weight.requires_grad)
        # weights, gradients and two moments
        assert result["num_trained_parameters"] == trained and result["peak_bytes"] > 4 * 4 * trained
    assert "| learned inverse, guided |" in capsys.readouterr().out
