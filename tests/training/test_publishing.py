import logging

import pytest

from flowback_hf import FlowBackPipeline
from flowback_hf.hub import is_as_written

from ..stand_in_hub import TOKEN


def test_a_run_publishes_its_pipeline_and_the_token_stays_where_it_was(
    train_rra, arguments, the_hub, tmp_path, monkeypatch, caplog
):
    monkeypatch.delenv("HF_TOKEN")
    output_dir = tmp_path / "run"
    options = {"push_to_hub": True, "hub_model_id": "group/flow", "hub_token": TOKEN, "hub_private_repo": True}
    with caplog.at_level(logging.DEBUG):
        train_rra.main(train_rra.parse_args(arguments(output_dir=output_dir, max_train_steps=2, **options)))
    repository = the_hub.repositories["group/flow"]
    assert repository.private and the_hub.tokens - {""} == {TOKEN}
    assert not any("checkpoint" in name or name.endswith((".jsonl", ".bin", ".pt")) for name in repository.files)
    card = repository.files["README.md"].decode()
    assert is_as_written(card) and (output_dir / "README.md").read_text() == card
    assert "| alignment | reverse, order 0, weight 0.1 |" in card and "| steps | 2 |" in card
    assert "aligned places | block 1 layer 2, block 2 layer 2" in card and str(tmp_path) not in card
    assert "samples/step-0000002.png" in repository.files
    weights = output_dir / "transformer" / "diffusion_pytorch_model.safetensors"
    assert repository.files[f"transformer/{weights.name}"] == weights.read_bytes()
    assert TOKEN not in caplog.text
    for path in output_dir.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_what_cannot_be_published_is_found_out_before_training(
    train_rra, arguments, the_hub, randomised_model, tmp_path, monkeypatch
):
    FlowBackPipeline(randomised_model().float()).push_to_hub("run")
    line = arguments(output_dir=tmp_path / "run", push_to_hub=True)
    with pytest.raises(ValueError, match="'tester/run' exists and holds a model of another configuration"):
        train_rra.main(train_rra.parse_args(line))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="There is no token to push with"):
        train_rra.main(train_rra.parse_args(line))
    assert not (tmp_path / "run").exists()


def test_a_hub_that_fails_in_the_end_costs_no_training(train_rra, arguments, the_hub, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(FlowBackPipeline, "push_to_hub", fail)
    line = arguments(output_dir=tmp_path / "run", push_to_hub=True, max_train_steps=1)
    message = r"(?s)no route to host.*The pipeline is saved in .*run, but could not be published.*push_to_hub.py --mod"
    with pytest.raises(ConnectionError, match=message):
        train_rra.main(train_rra.parse_args(line))
    assert FlowBackPipeline.from_pretrained(tmp_path / "run").labels == {"cat": 0, "dog": 1}
