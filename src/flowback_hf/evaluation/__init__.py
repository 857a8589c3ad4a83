"""Evaluation of trained flows: likelihood, classification, samples and linear probes, as a whole or in parts."""

from flowback_hf.evaluation.images import LabelledImages, match_labels
from flowback_hf.evaluation.likelihood import evaluate_likelihood
from flowback_hf.evaluation.parts import Parts, join_processes, map_batches
from flowback_hf.evaluation.probe import evaluate_linear_probe
from flowback_hf.evaluation.report import (
    Level,
    ProbeCurve,
    by_prefix,
    draw_guidance_curve,
    draw_linear_probe,
    draw_linear_probes,
    markdown,
)
from flowback_hf.evaluation.run import check_extras, evaluate
from flowback_hf.evaluation.samples import evaluate_samples, save_reference
from flowback_hf.evaluation.sampling import (
    choose_class_labels,
    draw_first_images,
    draw_grid,
    image_path,
    sample_images,
    sample_into_folder,
    write_npz,
)
from flowback_hf_cli.evaluation import EvaluationArguments


__all__ = [
    "EvaluationArguments",
    "LabelledImages",
    "Level",
    "Parts",
    "ProbeCurve",
    "by_prefix",
    "check_extras",
    "choose_class_labels",
    "draw_first_images",
    "draw_grid",
    "draw_guidance_curve",
    "draw_linear_probe",
    "draw_linear_probes",
    "evaluate",
    "evaluate_likelihood",
    "evaluate_linear_probe",
    "evaluate_samples",
    "image_path",
    "join_processes",
    "map_batches",
    "markdown",
    "match_labels",
    "sample_images",
    "sample_into_folder",
    "save_reference",
    "write_npz",
]
