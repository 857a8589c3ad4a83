import json

import pytest


OPTIONS = (
    "--sample_size 8 --patch_size 4 --num_blocks 2 --num_layers 1 --num_attention_heads 1 --attention_head_dim 8"
    " --image_size 12 --batch_size 2 --num_steps 3 --repeats 1 --threads 1"
).split()


def test_it_counts_reads_and_times_each_loop(benchmark_script, tmp_path, monkeypatch):
    # It looks at labels on the CPU, and on no other device.
    monkeypatch.setattr("flowback_hf.alignment.objective.check_class_labels", lambda *arguments: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    output = tmp_path / "train_loop.json"
    benchmark_script("train_loop").main([*OPTIONS, "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    loops = {result["loop"]: result for result in results["loops"]}
    assert {loop: result["reads_per_step"] for loop, result in loops.items()} == {
        "as it is": 0,
        "reading every step": 1,
        "one batch": 0,
    }
    for result in loops.values():
        assert 0 < result["min_seconds"] <= result["median_seconds"] <= result["max_seconds"]
        assert result["images_per_second"] == pytest.approx(2 / result["median_seconds"])
    assert results["loader_share"] == pytest.approx(1 - loops["one batch"]["times_as_it_is"])
    assert "| reading every step |" in output.with_suffix(".md").read_text()


def test_one_batch_is_loaded_once(benchmark_script):
    loader = [{"number": number} for number in range(4)]
    watched = benchmark_script("train_loop").WatchedLoader(loader, reads=[], repeats_batch=True)
    assert [batch["number"] for batch in watched] == [0] * 4
    watched = benchmark_script("train_loop").WatchedLoader(loader, reads=["item"], repeats_batch=False)
    assert [batch["number"] for batch in watched] == [0, 1, 2, 3]
    assert watched.counts == [1] * 4
