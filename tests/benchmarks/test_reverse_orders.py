import json
from pathlib import Path

import pytest


def test_orders_of_a_random_and_a_trained_flow(benchmark_script, train_rra, arguments, tmp_path, capsys):
    run = tmp_path / "tiny"
    options = {"alignment": "none", "max_train_steps": 2, "checkpointing_steps": 2}
    train_rra.main(train_rra.parse_args(arguments(output_dir=run, **options)))
    output = tmp_path / "orders.json"
    benchmark_script("reverse_orders").main(
        ["--runs", str(run), "--orders", "0", "2", "40", "--batch_size", "3", "--output", str(output)]
    )
    flows = json.loads(output.read_text())["results"]
    assert [flow["flow"] for flow in flows] == [*(f"random, output std {std}" for std in (0.03, 0.05, 0.07)), "tiny"]
    for flow in flows:
        rows = {(row["strategy"], row["order"]): row for row in flow["gradients"]}
        assert list(rows) == [("detach", None), ("reverse", 0), ("reverse", 2), ("reverse", "exact")]
        assert rows["reverse", "exact"]["relative_error"] < 1e-8
        assert rows["reverse", "exact"]["worst_block_relative_error"] < 1e-8
        assert set(rows["reverse", 0]["log_growth"].values()) == {0.0}
        assert rows["detach", None]["relative_error"] > rows["reverse", "exact"]["relative_error"]
    assert "| tiny | 16 | reverse exact |" in capsys.readouterr().out
    assert "| tiny | 16 | reverse exact |" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--orders", "-1"], "--orders must be at least 0"),
        (
            ["--runs", str(Path(__file__).parent)],
            "--runs must be finished output folders of training/train_rra.py, but",
        ),
    ],
)
def test_bad_arguments(benchmark_script, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark_script("reverse_orders").parse_args(options)
    assert message in capsys.readouterr().err
