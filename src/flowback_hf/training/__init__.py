"""
Training flows and their learned inverses: the trainers, and what the flags of `training/train_rra.py` and
`training/train_reverse.py` build for them.
"""

from flowback_hf.training.checkpoints import find_checkpoint, list_checkpoints, load_averaged_parameters
from flowback_hf.training.flow import LabelledFlow, make_flow, make_objective, make_source, make_teacher
from flowback_hf.training.processes import decide
from flowback_hf.training.reverse import (
    ReverseTrainer,
    choose_sampled_guidance_scale,
    choose_validation_guidance_scale,
    make_reverse_objective,
    make_reverse_source,
)
from flowback_hf.training.run_folder import check_run_folder, describe_processes
from flowback_hf.training.trainer import Trainer, make_accelerator
from flowback_hf_cli.training import TrainingArguments


__all__ = [
    "LabelledFlow",
    "ReverseTrainer",
    "Trainer",
    "TrainingArguments",
    "check_run_folder",
    "choose_sampled_guidance_scale",
    "choose_validation_guidance_scale",
    "decide",
    "describe_processes",
    "find_checkpoint",
    "list_checkpoints",
    "load_averaged_parameters",
    "make_accelerator",
    "make_flow",
    "make_objective",
    "make_reverse_objective",
    "make_reverse_source",
    "make_source",
    "make_teacher",
]
