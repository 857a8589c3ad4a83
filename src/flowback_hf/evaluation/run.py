# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""A whole evaluation: what is measured on which images, in which order, and what is written."""

import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from flowback_hf.data.splits import DataSource, HoldOut, first_rows, load_split
from flowback_hf.evaluation.images import LabelledImages, match_labels
from flowback_hf.evaluation.likelihood import evaluate_likelihood
from flowback_hf.evaluation.parts import Parts, Results, hash_networks, join_processes
from flowback_hf.evaluation.probe import evaluate_linear_probe
from flowback_hf.evaluation.report import draw_guidance_curve, draw_linear_probe, markdown
from flowback_hf.evaluation.samples import FeatureExtractor, evaluate_samples, load_extractor, save_reference
from flowback_hf.evaluation.sampling import choose_class_labels, draw_first_images, image_path
from flowback_hf.files import read_json, write_json, write_text
from flowback_hf.metrics import ReferenceFeatures
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline
from flowback_hf.pipelines.pipeline_flowback_classification import FlowBackClassificationPipeline
from flowback_hf_cli.evaluation import EvaluationArguments


def evaluate(
    pipeline: FlowBackPipeline, options: EvaluationArguments, command: Sequence[str] | None = None
) -> Results | None:
    """
    Evaluate a flow on a data set, and write a report.

    Writes `evaluation.json`, `evaluation.md` and figures into `options.output_dir`, and finished parts into `parts/`
    below it: a second call goes on where the first was interrupted.

    Args:
        pipeline ([`FlowBackPipeline`]): The flow. It is moved to the device of this process.
        options ([`EvaluationArguments`]): What is evaluated, and how.
        command (`Sequence[str]`, *optional*): The command line that the report says it came from.
    Returns:
        `dict`: the content of `evaluation.json`, on the main process; `None` on the others.
    Raises:
        ImportError: if an extra is missing.
        ValueError: if something in the options is impossible. Nothing has been written then.

    Example:
        ```py
        >>> import tempfile
        >>> from pathlib import Path
        >>> import PIL.Image
        >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
        >>> from flowback_hf.evaluation import EvaluationArguments, evaluate

        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (folder / "validation" / name).mkdir(parents=True)
        ...     PIL.Image.new("RGB", (8, 8)).save(folder / "validation" / name / "0.png")
        >>> flow = TarFlowTransformer2DModel(8, 4, 3, num_blocks=2, num_layers=1, num_classes=2)
        >>> pipeline = FlowBackPipeline(flow, id2label={0: "cat", 1: "dog"})
        >>> options = EvaluationArguments("random", folder / "evaluation", data_dir=str(folder), methods=["bayes"])
        >>> evaluate(pipeline, options)["num_images"]
        2
        ```
    """
    state = join_processes()
    datasets.utils.logging.set_verbosity_error()
    if state.num_processes > 1 and not state.is_main_process:
        datasets.utils.logging.disable_progress_bar()
    evaluation = Evaluation(state, pipeline, options)
    state.wait_for_everyone()  # all have looked at what is there
    results = evaluation.run()
    results["command"] = shlex.join(["python", "pipelines/evaluate_flow.py", *(command or [])])
    if not state.is_main_process:
        return None
    evaluation.write_report(results)
    evaluation.parts.forget_batches()
    return results


def check_extras(features: bool, linear_probe: bool):
    """
    Raise ImportError for a package that an evaluation needs and that is missing.

    Args:
        features (`bool`): Whether samples are compared with images.
        linear_probe (`bool`): Whether hidden states are probed.
    """
    needed = [
        *(["matplotlib", "torchmetrics"] if features else []),
        *(["matplotlib", "sklearn"] if linear_probe else []),
    ]
    for module in needed:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f'This evaluation needs {module}: pip install "flowback_hf[eval]".') from error


class Evaluation:
    """
    One evaluation. Making it finds everything a user can get wrong, before anything is written.

    Args:
        state ([`~accelerate.PartialState`]): The processes that share the work.
        pipeline ([`FlowBackPipeline`]): The flow.
        options ([`EvaluationArguments`]): What is evaluated, and how.
    """

    def __init__(self, state: PartialState, pipeline: FlowBackPipeline, options: EvaluationArguments):
        self.state = state
        self.options = options
        check_extras(options.features is not None, options.linear_probe)
        check_flow(pipeline, options)
        self.pipeline = pipeline.to(state.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.transformer.requires_grad_(False)  # a backward to the classes then keeps less
        self.classifier = FlowBackClassificationPipeline.from_pipe(pipeline)
        self.classifier.set_progress_bar_config(disable=True)
        self.guidance_rule = options.guidance_rule or pipeline.config.guidance_rule
        # Evaluations from before there was a choice do not name it.
        self.solver = {} if options.solver == "auto" else {"solver": options.solver}
        self.source = DataSource.from_args(options)
        self.hold_out = HoldOut.read(options.model, self.source.name) if Path(options.model).is_dir() else None
        self.images = self.load_images(options.split, options.max_images)
        self.extractor = self.reference = self.reference_images = self.probe_images = None
        if options.features is not None:
            self.extractor = load_extractor(options.features, options.cache_dir).to(state.device)
            if options.reference is not None:
                self.reference = ReferenceFeatures.load(options.reference, self.extractor.name)
            else:
                # Precision and recall look at the third neighbor of each image.
                self.reference_images = self.load_images(options.reference_split, options.max_reference_images, 4)
        if options.linear_probe:
            self.probe_images = self.load_images(options.reference_split, options.max_probe_images)
        self.parts = Parts(options.output_dir / "parts", state)
        self.settings = self.collect_settings()
        for name, settings in self.settings.items():
            self.parts.check(name, settings)
        for scale in options.guidance_scales if self.extractor is not None else []:
            self.check_samples(scale)

    def load_images(self, split: str, max_images: int | None, at_least: int = 2) -> LabelledImages:
        """At most `max_images` labelled images of a split, at the flow's size, of which `at_least` can be used."""
        options = self.options
        rows = load_split(self.source, split, options.image_column, self.hold_out)
        rows = first_rows(rows, max_images)
        label_ids = match_labels(rows, options.label_column, self.pipeline)
        images = LabelledImages.for_flow(self.classifier, rows, options.image_column, label_ids, options.strict, split)
        images.check_usable(at_least)
        return images

    def collect_settings(self) -> dict[str, dict[str, Any]]:
        """What the results of each part depend on, by the part's name."""
        options = self.options
        common = {
            "model": str(options.model),
            "model_hash": hash_networks(self.pipeline),
            "data": self.source.name,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "strict": options.strict,
        }
        split = {"split": options.split, "num_images": len(self.images)}
        settings = {
            "likelihood": {
                **common,
                **split,
                "methods": list(options.methods),
                "num_noise_draws": options.num_noise_draws,
                "shortlist_size": options.shortlist_size,
            }
        }
        if self.reference_images is not None:
            settings["reference"] = {
                **common,
                "features": self.extractor.name,
                "split": options.reference_split,
                "num_images": len(self.reference_images),
            }
        guidance_scales = options.guidance_scales if self.extractor is not None else []
        sampler_hash = hash_networks(self.pipeline, options.solver) if guidance_scales else None
        for scale in guidance_scales:
            settings[f"samples_guidance_{scale}"] = {
                **common,
                "model_hash": sampler_hash,
                "features": self.extractor.name,
                "reference": str(options.reference or options.reference_split),
                "num_samples": options.num_samples,
                "guidance_scale": scale,
                "guidance_rule": self.guidance_rule,
                # Evaluations of earlier versions have null where the schedule was not given.
                "guidance_schedule": None if options.guidance_schedule == "constant" else options.guidance_schedule,
                "guidance_temperature": options.guidance_temperature,
                **self.solver,
            }
        if self.probe_images is not None:
            settings["linear_probe"] = {**common, **split, "num_probe_images": len(self.probe_images)}
        return settings

    def run(self) -> Results:
        """All results, from parts that are done and from those that this call does."""
        options = self.options
        results: Results = {
            "model": model_name(options.model),
            "dataset": dataset_name(self.source),
            "split": options.split,
            "reference_split": options.reference_split,
            "num_noise_draws": options.num_noise_draws,
            "shortlist_size": options.shortlist_size,
            "seed": options.seed,
        }
        num_classes = self.pipeline.transformer.config.num_classes
        if num_classes is not None:
            results["num_classes"] = num_classes
        results |= self.parts.run(
            "likelihood",
            self.settings["likelihood"],
            lambda folder: evaluate_likelihood(
                self.state,
                folder,
                self.classifier,
                self.images,
                methods=list(options.methods),
                num_noise_draws=options.num_noise_draws,
                shortlist_size=options.shortlist_size,
                batch_size=options.batch_size,
                seed=options.seed,
            ),
        )
        if self.extractor is not None:
            results |= self.run_samples(self.extractor)
        if self.probe_images is not None:
            results |= self.parts.run(
                "linear_probe",
                self.settings["linear_probe"],
                lambda folder: evaluate_linear_probe(
                    self.state,
                    folder,
                    self.classifier,
                    self.probe_images,
                    self.images,
                    batch_size=options.batch_size,
                    seed=options.seed,
                ),
            )
        return results

    def run_samples(self, extractor: FeatureExtractor) -> Results:
        """Results at every guidance scale, and which scale is the best."""
        options, results = self.options, {}
        reference = self.reference or self.make_reference(extractor)
        for scale in options.guidance_scales:
            name = f"samples_guidance_{scale}"

            def compute(folder: Path, scale: float = scale) -> Results:
                measured = evaluate_samples(
                    self.state,
                    folder,
                    self.pipeline,
                    extractor,
                    reference,
                    self.samples_dir(scale),
                    num_samples=options.num_samples,
                    batch_size=options.batch_size,
                    seed=options.seed,
                    guidance_scale=scale,
                    guidance_rule=options.guidance_rule,
                    guidance_schedule=options.guidance_schedule or "constant",
                    guidance_temperature=options.guidance_temperature,
                    **self.solver,
                )
                return {f"{key}/guidance_{scale}": value for key, value in measured.items()}

            results |= self.parts.run(name, self.settings[name], compute)
        distances = {scale: results[f"frechet_distance/guidance_{scale}"] for scale in options.guidance_scales}
        best = min(distances, key=distances.get)
        return results | {
            "best_guidance_scale": best,
            "best_frechet_distance": distances[best],
            "guidance_rule": self.guidance_rule,
            "guidance_schedule": options.guidance_schedule or "constant",
            **self.solver,
            "features": extractor.name,
            "reference": reference.name,
            "num_reference_images": reference.num_images,
            "num_samples": options.num_samples,
        }

    def make_reference(self, extractor: FeatureExtractor) -> ReferenceFeatures:
        """The features of real images, in `reference.npz`."""
        path = self.options.output_dir / "reference.npz"
        name = f"{dataset_name(self.source)}, {self.options.reference_split}"

        def compute(folder: Path) -> Results:
            save_reference(self.state, folder, extractor, self.reference_images, name, path, self.options.batch_size)
            return {}

        self.parts.run("reference", self.settings["reference"], compute)
        return ReferenceFeatures.load(path, extractor.name)

    def samples_dir(self, guidance_scale: float) -> Path:
        return self.options.output_dir / "samples" / f"guidance_{guidance_scale}"

    def check_samples(self, guidance_scale: float):
        """Raise ValueError if there are samples, but nothing says how they were made."""
        folder, part = self.samples_dir(guidance_scale), self.parts.folder / f"samples_guidance_{guidance_scale}"
        if image_path(folder, 0).exists() and not part.exists():
            raise ValueError(
                f"{folder} holds images, but {part}, which says how they were made, is missing: delete the images."
            )

    def write_report(self, results: Results):
        """Write the results, the page and the figures."""
        options, output_dir = self.options, self.options.output_dir
        write_json(output_dir / "evaluation.json", results)
        if self.extractor is not None:
            draw_guidance_curve(results, output_dir / "guidance_curve.png")
            best_scale = results["best_guidance_scale"]
            draw_first_images(
                self.pipeline,
                self.samples_dir(best_scale),
                choose_class_labels(self.pipeline, None),
                options.num_samples,
                output_dir / "samples.png",
            )
            if options.write_best_guidance:
                index_file = Path(options.model) / "model_index.json"
                best = {"guidance_scale": best_scale, "guidance_rule": self.guidance_rule}
                write_json(index_file, read_json(index_file) | best)
        if options.linear_probe:
            draw_linear_probe(results, output_dir / "linear_probe.png")
        write_text(output_dir / "evaluation.md", markdown(results))


def check_flow(pipeline: FlowBackPipeline, options: EvaluationArguments):
    """Raise ValueError for options that this flow cannot have."""
    samples = options.features is not None
    if pipeline.transformer.config.num_classes is None:
        if options.linear_probe:
            raise ValueError("`--linear_probe` needs classes, but this flow is unconditional.")
        guides_itself = samples and options.solver != "learned" and max(options.guidance_scales) > 1
        if guides_itself and options.guidance_temperature == 1.0:
            raise ValueError(
                "An unconditional flow guides itself: give --guidance_temperature, or --guidance_scales 1.0, which is"
                " off."
            )
    for scale in options.guidance_scales if samples else []:
        pipeline.check_inputs(
            guidance_scale=scale,
            guidance_rule=options.guidance_rule,
            guidance_schedule=options.guidance_schedule or "constant",
            guidance_temperature=options.guidance_temperature,
            solver=options.solver,
        )


def model_name(model: str) -> str:
    """What reports call a model: its Hub id, or the last two parts of its folder's path."""
    return "/".join(Path(model).resolve().parts[-2:]) if Path(model).is_dir() else model


def dataset_name(source: DataSource) -> str:
    """What reports call a data set: its name, or its folder's; `images` lends the name of the folder above it."""
    if not source.is_image_folder:
        return source.name
    folder = Path(source.name).resolve()
    return folder.parent.name if folder.name == "images" else folder.name
