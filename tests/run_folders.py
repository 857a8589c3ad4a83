"""Output folders of the training script: a tiny one, and those behind the cards in model_cards/."""

import json
from pathlib import Path

import PIL.Image

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel


REPOSITORY = Path(__file__).parents[1]
ARGUMENTS = {
    "train_data_dir": "/home/somebody/data/pets/images", "dataset_name": None, "random_flip": True,
    "label_dropout": 0.1, "alignment": "reverse", "alignment_order": None, "alignment_weight": 0.1,
    "teacher_model_name_or_path": "facebook/dinov2-base", "max_train_steps": 20, "train_batch_size": 4,
    "gradient_accumulation_steps": 2, "adam_beta1": 0.9, "adam_beta2": 0.95, "learning_rate": 1e-3,
    "lr_scheduler": "cosine", "lr_warmup_steps": 5, "adam_weight_decay": 1e-4, "max_grad_norm": 1.0, "use_ema": True,
    "ema_decay": 0.99, "mixed_precision": "bf16", "seed": 3, "validation_guidance_scale": 1.5,
    "max_validation_samples": 1024,
}  # fmt: skip
METRICS = [
    {"step": 0, "validation_nll": 1.25},
    {"step": 20, "loss": 0.5, "cosine_similarity/block1_layer2": 0.25, "cosine_similarity/block3_layer1": 0.75},
    {"step": 20, "validation_nll": -0.125},
]


def write_tiny_run(folder: Path, transformer: TarFlowTransformer2DModel) -> Path:
    """Write what a run of the training script leaves, its checkpoints and logs included."""
    pipeline = FlowBackPipeline(transformer, id2label={0: "cat, felis", 1: "dog"})
    pipeline.register_to_config(guidance_scale=1.5)
    pipeline.save_pretrained(folder)
    (folder / "training_args.json").write_text(json.dumps(ARGUMENTS))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS))
    for name in ("samples/step-0000000.png", "samples/step-0000020.png", "loss_curve.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(folder / name)
    for name in ("checkpoint-20/optimizer.bin", "logs/events", "teacher/model.safetensors"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"not to be published")
    return folder


# The published runs, as far as their files appear in a card. This is enough to write their cards again.
ICONS = ["boat", "cat", "fish", "flower", "heart", "house", "moon", "mushroom", "star", "tree"]
SHAPES = ["arrow", "circle", "crescent", "cross", "ellipse", "heart", "ring", "square", "star", "triangle"]
PUBLISHED_ARGUMENTS = {
    "dataset_name": None, "random_flip": False, "label_dropout": 0.1, "alignment": "reverse", "alignment_order": None,
    "alignment_weight": 0.3, "gradient_accumulation_steps": 1, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "lr_scheduler": "cosine", "lr_warmup_steps": 50, "adam_weight_decay": 1e-4, "max_grad_norm": 1.0, "use_ema": True,
    "ema_decay": 0.99, "mixed_precision": None, "seed": 0, "validation_guidance_scale": 2.0,
    "max_validation_samples": 1024,
}  # fmt: skip
PUBLISHED_RUNS = {
    "demo_digits": {
        "names": [str(digit) for digit in range(10)],
        "demo": {"kind": "digits", "num_train_images": 1500, "num_validation_images": 297},
        "arguments": {"max_train_steps": 1200, "train_batch_size": 64, "learning_rate": 2e-3},
        "validation_nll": [1.2822, -0.1825],
        "cosine_similarity": {"block3_layer2": 0.8352, "block4_layer2": 0.8364},
    },
    "demo_icons": {
        "names": ICONS,
        "demo": {"kind": "icons", "num_train_images": 16000, "num_validation_images": 1000},
        "arguments": {
            "max_train_steps": 1200,
            "train_batch_size": 64,
            "learning_rate": 1.5e-3,
            "validation_guidance_scale": 1.5,
        },
        "validation_nll": [1.1588, -0.7573],
        "cosine_similarity": {"block7_layer2": 0.8894, "block8_layer2": 0.8750},
    },
    "demo_shapes": {
        "names": SHAPES,
        "demo": {"kind": "shapes", "num_train_images": 8000, "num_validation_images": 1000},
        "arguments": {"max_train_steps": 2500, "train_batch_size": 32, "learning_rate": 1e-3},
        "validation_nll": [1.1157, -1.2017],
        "cosine_similarity": {"block3_layer2": 0.8398, "block4_layer2": 0.8095},
    },
}


def write_published_run(name: str, folder: Path) -> tuple[FlowBackPipeline, Path]:
    """Write a run's files into `folder`; return a pipeline of its configuration and the run's folder."""
    run = PUBLISHED_RUNS[name]
    data_dir, run_dir = folder / run["demo"]["kind"], folder / name
    for path in (data_dir / "images", data_dir / "teacher", run_dir / "samples"):
        path.mkdir(parents=True)
    (data_dir / "demo.json").write_text(json.dumps(run["demo"]))
    places = {"train_data_dir": str(data_dir / "images"), "teacher_model_name_or_path": str(data_dir / "teacher")}
    arguments = {**PUBLISHED_ARGUMENTS, **run["arguments"], **places}
    (run_dir / "training_args.json").write_text(json.dumps(arguments))
    steps = run["arguments"]["max_train_steps"]
    first, last = run["validation_nll"]
    metrics = [
        {"step": 0, "validation_nll": first},
        {
            "step": steps,
            "loss": last,
            **{f"cosine_similarity/{place}": value for place, value in run["cosine_similarity"].items()},
        },
        {"step": steps, "validation_nll": last},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    PIL.Image.new("RGB", (8, 8)).save(run_dir / "samples" / f"step-{steps:07d}.png")
    config = json.loads((REPOSITORY / "training" / "configs" / f"{name}.json").read_text())
    pipeline = FlowBackPipeline(
        TarFlowTransformer2DModel(**config),
        id2label=dict(enumerate(run["names"])),
        guidance_scale=arguments["validation_guidance_scale"],
    )
    return pipeline, run_dir
