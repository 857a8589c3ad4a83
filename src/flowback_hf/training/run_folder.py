# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: its settings, the log, and the pipeline."""

import json
from pathlib import Path
from typing import Any

from flowback_hf import FlowBackPipeline
from flowback_hf.files import compare_settings, partial_path, read_json, read_json_lines, remove, replace, write_text
from flowback_hf.reporting import import_pyplot, save_figure
from flowback_hf.training.adapters import ADAPTER_FILE


SETTINGS_FILE = "training_args.json"
METRICS_FILE = "metrics.jsonl"

# What a resumed run may change: how it is run and watched, and how long, which stretches the learning rate's schedule.
RESUMABLE_SETTINGS = {
    "cache_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "dataloader_num_workers",
    "eval_batch_size",
    "hub_model_id",
    "hub_private_repo",
    "logging_dir",
    "logging_steps",
    "max_train_steps",
    "max_validation_samples",
    "num_train_epochs",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "tracker_project_name",
    "validation_class_labels",
    "validation_guidance_scale",
    "validation_steps",
}


def check_run_folder(folder: str | Path, settings: dict[str, Any], resume_from_checkpoint: str | None) -> bool:
    """
    Check that a run may write to a folder, before anything is written.

    Args:
        folder (`str` or `pathlib.Path`): The output folder.
        settings (`dict`): What `training_args.json` is to hold.
        resume_from_checkpoint (`str`, *optional*): Whether an earlier run is to go on.
    Returns:
        `bool`: whether there is a run to resume.
    Raises:
        ValueError: if the folder holds another run, another model, or a run that is not to be resumed.
    """
    folder = Path(folder)
    earlier = read_json(folder / SETTINGS_FILE)
    if earlier is None:
        if any(any(folder.glob(name)) for name in ("checkpoint-*", "model_index.json", ADAPTER_FILE)):
            raise ValueError(f"`--output_dir` {folder} already holds another model: choose another folder.")
        return False
    if resume_from_checkpoint is None:
        raise ValueError(
            f"`--output_dir` {folder} already holds a run: add --resume_from_checkpoint latest to go on with it, or"
            " choose another folder."
        )
    different = compare_settings(earlier, settings, RESUMABLE_SETTINGS)
    if different:
        flags = ", ".join(f"--{difference}" for difference in different)
        raise ValueError(f"`--output_dir` {folder} holds a different run; it differs in {flags}.")
    return True


def save_pipeline(pipeline: FlowBackPipeline, folder: Path):
    """Write a pipeline into a run's folder. `model_index.json` comes last: a folder that has one holds all of it."""
    staging = partial_path(folder / "pipeline")
    remove(staging)
    pipeline.save_pretrained(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.is_file()):
        replace(path, folder / path.name)
    staging.rmdir()


class MetricsLog:
    """
    `metrics.jsonl`, one JSON object a line, and the loss curve drawn from it.

    Args:
        folder (`pathlib.Path`): The run's folder.
        last_step (`int`): Lines of later steps are deleted: a resumed run does those steps again.
    """

    def __init__(self, folder: Path, last_step: int = 0):
        self.path = folder / METRICS_FILE
        earlier = read_json_lines(self.path)
        self.records = [record for record in earlier if 0 < last_step >= record["step"]]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def write(self, record: dict[str, Any]):
        """Append a line."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def draw(self, path: Path):
        """Draw the likelihood and the alignment over the steps."""
        plt = import_pyplot()
        panels = {
            "nats per dimension": ("nll", "validation_nll"),
            "mean of -cos": ("alignment",),
        }
        recorded = {key for record in self.records for key in record}
        panels = {label: keys for label, keys in panels.items() if recorded.intersection(keys)}
        figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained")
        for axis, (label, keys) in zip(axes[0], panels.items()):
            for key in keys:
                points = [(record["step"], record[key]) for record in self.records if key in record]
                if points:
                    axis.plot(*zip(*points), label=key.replace("_", " "), marker="o" if "validation" in key else None)
            axis.set(xlabel="step", ylabel=label)
            axis.legend()
            axis.grid(alpha=0.3)
        save_figure(figure, path, dpi=100)
