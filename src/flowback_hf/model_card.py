# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Model cards, filled from a pipeline and from the files of the run that trained it."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from flowback_hf.alignment.teacher import DEFAULT_TEACHER
from flowback_hf.files import read_json, read_metrics_log
from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline, classes_by_name, read_whole_number
from flowback_hf.places import Place, parse_place
from flowback_hf.reporting import markdown_code, markdown_table, markdown_text


HASH_LINE = re.compile(r"\n*<!-- flowback_hf: written by (?:model_card|hub)\.py, sha256 ([0-9a-f]{64}) -->\s*\Z")
MAX_NAMED_CLASSES = 20
COSINE_SIMILARITY = "cosine_similarity/"  # in the log, before the name of the place


# The files of a run


@dataclass
class Run:
    """
    What an output folder of `training/train_rra.py` says about the training of a pipeline.

    Args:
        args (`dict`): The training arguments, from `training_args.json`.
        metrics (`list[dict]`): What was logged, step by step, from `metrics.jsonl`.
        evaluation (`dict`, *optional*): The results of `pipelines/evaluate_flow.py`, from `evaluation.json`.
        grid (`pathlib.Path`, *optional*): The newest grid of samples, from `samples/`.
    """

    args: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    grid: Path | None = None

    @classmethod
    def read(cls, run_dir: str | os.PathLike | None) -> "Run":
        """
        Read a run's files.

        Args:
            run_dir (`str`, *optional*): The output folder. Files may be missing.
        Returns:
            [`Run`]: the run. It is empty if `run_dir` is `None`.
        """
        if run_dir is None:
            return cls()
        run_dir = Path(run_dir)
        return cls(
            args=read_json(run_dir / "training_args.json") or {},
            metrics=read_metrics_log(run_dir),
            evaluation=read_json(run_dir / "evaluation.json"),
            grid=max(run_dir.glob("samples/step-*.png"), default=None),
        )

    @property
    def is_aligned(self) -> bool:
        """Whether the flow was trained with alignment."""
        return self.args.get("alignment", "none") != "none"

    @property
    def trains_inverse(self) -> bool:
        """Whether the run trained the learned inverse of a given flow."""
        return "supervision" in self.args

    @property
    def teacher(self) -> str | None:
        """
        The teacher's Hub id or folder. Stored features name theirs; without a name it is the default teacher.

        It is `None` for a run that was started from Python, which does not record it.
        """
        if "teacher_model_name_or_path" not in self.args:
            return None
        for option, file in {"teacher_features": "features.json", "latents": "latents.json"}.items():
            if self.args.get(option) is not None:
                teacher = (read_json(Path(self.args[option], file)) or {}).get("teacher")
                if teacher is not None:
                    return teacher
        return self.args.get("teacher_model_name_or_path") or DEFAULT_TEACHER

    @property
    def data(self) -> str | None:
        """
        The data set's Hub id or folder. For latents, it is the data set that they were computed from.

        It is `None` for a run that was started from Python, which does not record it.
        """
        if self.args.get("latents") is not None:
            return self.latents_settings.get("data", self.args["latents"])
        folder = self.args.get("train_data_dir")
        return self.args.get("dataset_name") or (None if folder is None else os.path.abspath(folder))

    @property
    def latents_settings(self) -> dict[str, Any]:
        """What `training/precompute_latents.py` noted about the latents. It is empty if it noted nothing."""
        return read_json(Path(self.args["latents"], "latents.json")) or {}


def find_run(pipeline: FlowBackPipeline, run_dir: str | os.PathLike | None = None) -> Path | None:
    """
    Find the output folder of the training script that belongs to a pipeline.

    Args:
        pipeline ([`FlowBackPipeline`]): The pipeline.
        run_dir (`str`, *optional*): The folder, if it is known.
    Returns:
        `pathlib.Path` or `None`: `run_dir`. By default, the folder that the pipeline was loaded from, or `None` if
        that is not an output folder of the training script.
    Raises:
        ValueError: if `run_dir` is given and is not such a folder.
    """
    if run_dir is None:
        loaded_from = pipeline.config.get("_name_or_path")
        is_run = loaded_from and Path(loaded_from, "training_args.json").exists()
        return Path(loaded_from) if is_run else None
    if not Path(run_dir, "training_args.json").exists():
        raise ValueError(f"`run_dir` must be an output folder of training/train_rra.py, but {str(run_dir)!r} is not.")
    return Path(run_dir)


# Cards and their edits


def read_edited_card(run_dir: str | os.PathLike) -> str | None:
    """
    Read the card in a run's folder if a person edited or wrote it.

    Args:
        run_dir (`str`): The run's folder.
    Returns:
        `str` or `None`: the text of `README.md`; `None` if there is no such file, or [`render_model_card`] wrote it.
    """
    path = Path(run_dir, "README.md")
    text = path.read_text(encoding="utf-8") if path.exists() else None
    return None if text is None or is_as_written(text) else text


def is_as_written(card: str) -> bool:
    """
    Tell whether a card is unchanged since [`render_model_card`] wrote it.

    Args:
        card (`str`): The card's text.
    Returns:
        `bool`: true if the card's last line holds the hash of the text before it.
    """
    match = HASH_LINE.search(card)
    return match is not None and match[1] == hash_of(card[: match.start()])


def hash_of(text: str) -> str:
    """Compute the SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def sign(text: str) -> str:
    """Append the line that [`is_as_written`] checks to a card's text."""
    text = text.rstrip("\n")
    return f"{text}\n\n<!-- flowback_hf: written by model_card.py, sha256 {hash_of(text)} -->\n"


def render_model_card(
    pipeline: FlowBackPipeline,
    repo_id: str,
    run_dir: str | os.PathLike | None = None,
    license: str = "apache-2.0",
    revision: str | None = None,
) -> str:
    """
    Write a model card with metadata.

    The card states only what the pipeline and the run's files say, and names no local path. Its last line is the hash
    of the text before it, by which [`is_as_written`] recognizes edits.

    Args:
        pipeline ([`FlowBackPipeline`]): The pipeline.
        repo_id (`str`): The repository's id, for the title and the code examples.
        run_dir (`str`, *optional*): The run's folder: `training_args.json`, `metrics.jsonl`, `samples/` and
            `evaluation.json`, as far as they exist.
        license (`str`, defaults to `"apache-2.0"`): The license of the weights.
        revision (`str`, *optional*): The commit of code and weights that the examples load.
    Returns:
        `str`: the card, in Markdown.

    Example:
        ```py
        >>> from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
        >>> from flowback_hf.model_card import is_as_written, render_model_card

        >>> flow = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=16
        ... )
        >>> card = render_model_card(FlowBackPipeline(flow), "somebody/tiny_flow")
        >>> "# tiny_flow" in card, is_as_written(card), is_as_written(card.replace("tiny", "small"))
        (True, True, False)
        ```
    """
    run = Run.read(run_dir)
    config, id2label = pipeline.transformer.config, pipeline.config.id2label or {}
    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[
            "flowback_hf",
            "normalizing-flow",
            "tarflow",
            "image-generation",
            *(["r-repa"] if run.is_aligned else []),
        ],
        datasets=hub_id(run.data) if run.args else None,
        base_model=hub_id(run.teacher) if run.is_aligned else None,
    )
    template = resources.files("flowback_hf").joinpath("model_card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        card_data,
        template_str=template,
        title=markdown_text(repo_id.split("/")[-1]),
        repo_id=repo_id,
        summary=describe_flow(pipeline, run.is_aligned),
        call=example_call(config, id2label),
        revision=revision,
        guidance=describe_guidance(pipeline),
        learned=describe_learned_inverse(pipeline),
        grid=None if run.grid is None else f"samples/{run.grid.name}",
        grid_caption=None if run.grid is None else describe_grid(run, config),
        model_table=settings_table(model_settings(pipeline) | learned_inverse_settings(pipeline)),
        classes=markdown_text(", ".join(id2label.values())) if 0 < len(id2label) <= MAX_NAMED_CLASSES else None,
        training_table=settings_table(training_settings(run)) if run.args else None,
        metrics_table=results_table(measurements(run.metrics)) if run.metrics else None,
        metrics_how=describe_metrics(run),
        evaluation_table=results_table(flatten(run.evaluation)) if run.evaluation else None,
        aligned=run.is_aligned,
        limits=describe_limits(pipeline),
    )
    return sign(str(card))


def render_adapter_card(pipeline: FlowBackPipeline, run_dir: str | os.PathLike, with_class_tables: bool) -> str:
    """
    Write the card of a LoRA adapter: how to load it, how it was trained and what was measured.

    Args:
        pipeline ([`FlowBackPipeline`]): A pipeline whose flow has one adapter.
        run_dir (`str`): The run's folder: `training_args.json` and `metrics.jsonl`.
        with_class_tables (`bool`): Whether the class tables were trained and saved, too.
    Returns:
        `str`: the card, in Markdown, signed as that of [`render_model_card`].
    """
    run = Run.read(run_dir)
    flow, id2label = pipeline.transformer, pipeline.config.id2label or {}
    folder_name = Path(os.path.abspath(run_dir)).name
    source = run.args.get("pretrained_model_name_or_path")
    base = hub_id(source) or f"path/to/{Path(source or 'flow').name}"
    card_data = ModelCardData(
        library_name="diffusers",
        tags=["flowback_hf", "normalizing-flow", "tarflow", "lora"],
        datasets=hub_id(run.data),
        base_model=hub_id(source),
    )
    template = resources.files("flowback_hf").joinpath("adapter_card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        card_data,
        template_str=template,
        title=markdown_text(folder_name),
        base=markdown_code(base),
        base_code=json.dumps(base, ensure_ascii=False),
        folder_code=json.dumps(f"path/to/{folder_name}", ensure_ascii=False),
        with_class_tables=with_class_tables,
        call=example_call(flow.config, id2label),
        guidance_scale=pipeline.config.guidance_scale,
        training_table=settings_table(adapter_settings(flow, with_class_tables) | training_settings(run)),
        metrics_table=results_table(measurements(run.metrics)),
        metrics_how=describe_metrics(run),
    )
    return sign(str(card))


def settings_table(settings: dict[str, Any]) -> str:
    return markdown_table(["setting", "value"], settings.items())


def results_table(results: dict[str, Any]) -> str:
    escaped = [(markdown_text(name), markdown_text(value)) for name, value in results.items()]
    return markdown_table(["result", "value"], escaped)


# Names that mean something on other machines


def hub_id(source: str | None) -> str | None:
    """Return the id of a data set or model on the Hub; `None` if the source is a folder, a file or not known."""
    if source is None or os.path.exists(source) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return None
    return source


def public_name(source: str) -> str:
    """Return what a card calls a source, as Markdown code: its id on the Hub, or the last two parts of its path."""
    return markdown_code(hub_id(source) or "/".join(Path(os.path.abspath(source)).parts[-2:]))


# Sentences


def describe_flow(pipeline: FlowBackPipeline, is_aligned: bool) -> str:
    config = pipeline.transformer.config
    size = pipeline.image_size
    kind = "An unconditional" if config.num_classes is None else f"A class-conditional ({config.num_classes} classes)"
    grey = "grey " if pipeline.vae is None and config.in_channels == 1 else ""
    text = (
        f"{kind} normalizing flow of {size}×{size} {grey}images"
        f"{'' if pipeline.vae is None else ', in the latent space of a VAE'}: a"
        " [TARFlow](https://arxiv.org/abs/2412.06329)"
    )
    if is_aligned:
        text += (
            " whose hidden states were aligned with a vision encoder's features ([Flowing"
            " Backwards](https://arxiv.org/abs/2511.22345))"
        )
    return f"{text}. It generates images, computes their exact log-density, and can be inverted exactly."


def example_call(config: Any, id2label: dict[str, str]) -> str:
    """Return the first arguments of the example's call."""
    if config.num_classes is None:
        return "num_images_per_prompt=4, "
    label_id, name = next(iter(id2label.items()), (0, ""))
    label = name.split(",")[0].strip()
    # Not one that is the number or the name of another class.
    own = int(label_id)
    is_clear = read_whole_number(label) in (None, own) and classes_by_name(id2label).get(label) == [own]
    labels = json.dumps([label if label and is_clear else own], ensure_ascii=False)
    return f"class_labels={labels}, num_images_per_prompt=4, "


def describe_guidance(pipeline: FlowBackPipeline) -> str:
    scale, rule = pipeline.config.guidance_scale, pipeline.config.guidance_rule
    if scale == 1.0:
        return "Guidance is off by default (`guidance_scale=1.0`)."
    return f"By default, `guidance_scale` is {scale:g} with the {rule} rule. 1.0 turns guidance off."


def describe_learned_inverse(pipeline: FlowBackPipeline) -> str | None:
    """Say what the learned inverse is for, and which guidance it takes; `None` without one."""
    if pipeline.reverse_transformer is None:
        return None
    config = pipeline.reverse_transformer.config
    text = (
        '`solver="learned"` samples with a learned inverse, in one evaluation instead of the flow\'s'
        f" {pipeline.transformer.config.num_blocks} sequential blocks. Its images are not those of the exact inverse,"
        " which the other solvers compute, and have no exact density."
    )
    if config.min_guidance_scale == config.max_guidance_scale:
        return f"{text} It takes `guidance_scale={config.min_guidance_scale:g}` only."
    return f"{text} It takes a `guidance_scale` from {config.min_guidance_scale:g} to {config.max_guidance_scale:g}."


def describe_grid(run: Run, config: Any) -> str:
    step = int(run.grid.stem.removeprefix("step-"))
    text = f"Drawn by the training script at step {step}"
    if "seed" in run.args:
        text += f", seed {run.args['seed']}"
    if config.num_classes is not None:
        text += ", one row per class"
        if "validation_guidance_scale" in run.args:
            text += f", `guidance_scale={run.args['validation_guidance_scale']:g}`"
    if run.trains_inverse:
        text += ", the exact sampler's on the left, those of the learned inverse of the same noise on the right"
    return f"{text}. The samples were not selected."


def describe_metrics(run: Run) -> str:
    weights = "averaged" if run.args.get("use_ema") else "last"
    max_images = run.args.get("max_validation_samples")
    images = "the validation images" if max_images is None else f"at most {max_images} validation images"
    if run.trains_inverse:
        return (
            f"The squared error is the mean over {images}, which are in [-1, 1], each with one draw of the training"
            f" noise, under the {weights} weights. Lower is better."
        )
    text = (
        f"The nll (negative log-likelihood) is the mean over {images}, each with one draw of the training noise, under"
        f" the {weights} weights. Lower is better."
    )
    if run.is_aligned:
        text += (
            " The cosine similarities compare projected hidden states with the teacher's features, in the last logged"
            " batch."
        )
    return text


def describe_limits(pipeline: FlowBackPipeline) -> str:
    config = pipeline.transformer.config
    size = pipeline.image_size
    sentences = [
        "This model is for teaching and for research on generative models with exact likelihoods.",
        f"It generates {size}×{size} images like those it was trained on, with their gaps and biases.",
        "It is not a source of facts about anybody or anything.",
    ]
    if config.noise_type == "gaussian" and config.noise_std > 0:
        sentences += [
            f"It was trained on images with Gaussian noise (σ = {config.noise_std:g}), so its densities are those of"
            " noisy images.",
            "The pipeline removes this noise from its samples, unless a call sets `denoise=False`.",
        ]
    if pipeline.vae is not None:
        sentences += [
            "Its densities are those of the VAE's latents, not of pixels.",
            "Decoding loses the details that the VAE loses.",
        ]
    if config.num_classes is not None:
        sentences.append("Strong guidance makes classes more distinct and samples less varied.")
    return " ".join(sentences)


# Tables


def learned_inverse_settings(pipeline: FlowBackPipeline) -> dict[str, Any]:
    if pipeline.reverse_transformer is None:
        return {}
    config = pipeline.reverse_transformer.config
    return {
        "learned inverse, parameters": f"{pipeline.reverse_transformer.num_parameters() / 1e6:.2f} M",
        "learned inverse, patch": f"{config.patch_size} × {config.patch_size}",
        "learned inverse, stages": f"{config.num_blocks + 1} of {config.num_layers} layers",
        "learned inverse, width": f"{config.num_attention_heads} heads of {config.attention_head_dim}",
    }


def model_settings(pipeline: FlowBackPipeline) -> dict[str, Any]:
    config = pipeline.transformer.config
    layers = config.num_layers
    noise = f"{config.noise_type}, σ = {config.noise_std:g}" if config.noise_type == "gaussian" else config.noise_type
    return {
        "parameters": f"{pipeline.transformer.num_parameters() / 1e6:.2f} M",
        "sample": f"{config.in_channels} × {config.sample_size} × {config.sample_size}",
        "tokens": (config.sample_size // config.patch_size) ** 2,
        "patch": f"{config.patch_size} × {config.patch_size}",
        "flow blocks": config.num_blocks,
        "transformer layers per block": layers if isinstance(layers, int) else ", ".join(map(str, layers)),
        "width": f"{config.num_attention_heads} heads of {config.attention_head_dim}",
        "position embedding": config.position_embedding,
        "activation": config.activation_fn,
        "training noise": noise,
    }


def adapter_settings(flow: TarFlowTransformer2DModel, with_class_tables: bool) -> dict[str, Any]:
    (adapter,) = flow.peft_config.values()
    sizes = [tensor.numel() for name, tensor in flow.named_parameters() if ".lora_" in name]
    return {
        "rank": adapter.r,
        "alpha": f"{adapter.lora_alpha:g}",
        "layers": ", ".join(f"`{name}`" for name in sorted(adapter.target_modules)),
        "parameters": f"{sum(sizes) / 1e6:.2f} M",
        "class tables": "trained" if with_class_tables else "those of the flow",
    }


def training_settings(run: Run) -> dict[str, Any]:
    args = run.args
    flips = "flipped at random" if args["random_flip"] else "not flipped"
    settings = {
        "data": describe_data(run),
        "augmentation": f"{flips}; {args['label_dropout']:.0%} of the labels dropped",
    }
    if run.trains_inverse:
        settings["trained"] = f"the learned inverse of a flow that was given; supervision {args['supervision']}"
    if run.is_aligned:
        order = f", order {args.get('alignment_order') or 0}" if args["alignment"] == "reverse" else ""
        places = {place for record in run.metrics for place in cosine_similarities(record)}
        settings["alignment"] = f"{args['alignment']}{order}, weight {args['alignment_weight']:g}"
        settings["aligned places"] = ", ".join(f"block {block} layer {layer}" for block, layer in sorted(places))
        settings["teacher"] = public_name(run.teacher) if run.teacher is not None else "not recorded"
    accumulation = args["gradient_accumulation_steps"]
    per_image = " times the images of a step" if args.get("scale_lr") else ""
    clipping = f"gradients clipped to {args['max_grad_norm']:g}" if args["max_grad_norm"] else "gradients not clipped"
    return settings | {
        "steps": max((record["step"] for record in run.metrics), default=args["max_train_steps"]),
        "batch size": f"{args['train_batch_size']} per process"
        + (f", {accumulation} accumulated" if accumulation > 1 else ""),
        "optimizer": (
            f"AdamW ({args['adam_beta1']:g}, {args['adam_beta2']:g}), learning rate {args['learning_rate']:g}"
            f"{per_image}, {args['lr_scheduler']} after {args['lr_warmup_steps']} steps of warm-up, weight decay"
            f" {args['adam_weight_decay']:g}, {clipping}"
        ),
        "averaged weights": f"decay {args['ema_decay']:g}" if args["use_ema"] else "no",
        "precision": args["mixed_precision"] or "as configured in Accelerate",
        "seed": args["seed"],
    }


def describe_data(run: Run) -> str:
    if run.data is None:
        return "not recorded"
    text = public_name(run.data)
    if run.args.get("latents") is not None:
        latents = run.latents_settings
        if latents:
            text += f" at {latents['resolution']}×{latents['resolution']}, as latents of {public_name(latents['vae'])}"
        else:
            text += " in latent space"
    demo = read_json(Path(run.data).parent / "demo.json")
    if demo is not None:
        text += (
            f", made by `training/prepare_demo.py --kind {demo['kind']}`: {demo['num_train_images']} training images,"
            f" {demo['num_validation_images']} validation images"
        )
    return text


def cosine_similarities(record: dict[str, float]) -> dict[Place, float]:
    """Return the cosine similarities of a record of `metrics.jsonl`, by place."""
    names = [name for name in record if name.startswith(COSINE_SIMILARITY)]
    return {parse_place(name.removeprefix(COSINE_SIMILARITY)): record[name] for name in names}


def measurements(metrics: list[dict[str, float]]) -> dict[str, Any]:
    """Return the last logged validation results and cosine similarities, and the untrained flow's validation nll."""
    table = {}
    reconstructions = [record for record in metrics if "validation_reconstruction" in record]
    if reconstructions:
        last = reconstructions[-1]
        value = f"{last['validation_reconstruction']:.4g} (step {last['step']})"
        table["squared error of validation images, restored from their latents"] = value
    validations = [record for record in metrics if "validation_nll" in record]
    if validations:
        first, last = validations[0], validations[-1]
        table["validation nll, nats per dimension"] = f"{last['validation_nll']:.4f} (step {last['step']})"
        if first is not last:
            table[f"validation nll at step {first['step']}"] = f"{first['validation_nll']:.4f}"
        if "validation_bits_per_dim" in last:
            table["validation bits per dimension"] = f"{last['validation_bits_per_dim']:.4f}"
    similarities = [found for record in metrics if (found := cosine_similarities(record))]
    if similarities:
        for (block, layer), value in similarities[-1].items():
            table[f"cosine similarity, block {block} layer {layer}"] = f"{value:.4f}"
    return table


def flatten(evaluation: Any, prefix: str = "") -> dict[str, Any]:
    """
    Turn nested results into one table. Each entry is named by its path, such as `accuracy / gradient`.

    Floats are rounded to five digits. Absolute paths in texts are cut to their last two parts.
    """
    if isinstance(evaluation, dict):
        entries = evaluation.items()
    elif isinstance(evaluation, list):
        entries = enumerate(evaluation, start=1)
    elif isinstance(evaluation, float):
        return {prefix: f"{evaluation:.5g}"}
    else:
        return {prefix: re.sub(r"(?<!\S)/\S+", lambda path: "/".join(Path(path[0]).parts[-2:]), str(evaluation))}
    table = {}
    for name, value in entries:
        table |= flatten(value, f"{prefix} / {name}" if prefix else str(name))
    return table
