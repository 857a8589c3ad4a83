import json
import subprocess
import sys

from .test_train_step import BENCHMARKS


def test_it_writes_what_a_checkpoint_takes(tmp_path):
    options = "--num_blocks 2 --num_layers 1 --num_attention_heads 1 --repeats 1 --batch_size 2 --threads 1".split()
    command = [sys.executable, BENCHMARKS / "checkpoints.py", *options, "--output", tmp_path / "checkpoints.json"]
    subprocess.run([*command, "--folder", tmp_path], check=True)
    results = json.loads((tmp_path / "checkpoints.json").read_text())["results"]
    assert results["seconds"].keys() == {"plain", "saved", "flush", "checksums", "background", "nll"}
    assert results["num_bytes"] > 4 * 4 * results["num_parameters"]  # weights, average and two moments in float32
    assert "| parameters | MB |" in (tmp_path / "checkpoints.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
