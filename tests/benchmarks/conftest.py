import importlib
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.data.demo.networks import make_image_processor, make_judge

# A tiny run of the training script, for the benchmarks of trained flows.
from ..training.conftest import train_rra  # noqa: F401


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLASS_NAMES = ["circle", "cross"]


@pytest.fixture
def benchmark_script(monkeypatch):
    """A function that imports a script of the benchmarks' folder as running one of them does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def demo(tmp_path):
    """A data set of four images with a judge that takes every image for a cross, and a run."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in CLASS_NAMES:
            folder = tmp_path / "data" / "images" / split / name
            folder.mkdir(parents=True)
            PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "0.png")
    judge = make_judge(CLASS_NAMES, seed=0)
    torch.nn.init.zeros_(judge.classifier[1].weight)
    judge.classifier[1].bias.data = torch.tensor([0.0, 1.0])
    judge.save_pretrained(tmp_path / "data" / "judge")
    make_image_processor(8).save_pretrained(tmp_path / "data" / "judge")

    flow = TarFlowTransformer2DModel(
        8, 4, 3, num_blocks=2, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    folder = tmp_path / "flow"
    FlowBackPipeline(flow, id2label=dict(enumerate(CLASS_NAMES))).save_pretrained(folder)
    (folder / "training_args.json").write_text(json.dumps({"train_batch_size": 4}))
    records = [{"step": 0, "validation_nll": 1.0}]
    records += [{"step": step, "images_per_second": speed} for step, speed in zip((10, 30), (8, 4))]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return tmp_path
