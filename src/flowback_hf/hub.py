# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Repositories of the Hub that load with and without this package, and the cards that describe them."""

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from flowback_hf.models import transformer_tarflow
from flowback_hf.pipelines import pipeline_flowback


logger = logging.get_logger(__name__)

# Who loads a repository without the package gets these two modules from it. Their names are distinctive, since code
# that comes from repositories shares one namespace.
PIPELINE_MODULE = "pipeline_flowback"
TRANSFORMER_MODULE = "transformer_tarflow"
HASH_LINE = re.compile(r"\n*<!-- flowback_hf: written by hub\.py, sha256 ([0-9a-f]{64}) -->\s*\Z")
MAX_NAMED_CLASSES = 20
DEFAULT_TEACHER = "facebook/dinov2-base"


# Publishing


def push_to_hub(
    pipeline: "pipeline_flowback.FlowBackPipeline",
    repo_id: str,
    run_dir: str | os.PathLike | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    license: str = "apache-2.0",
    force: bool = False,
) -> str:
    """
    What [`FlowBackPipeline.push_to_hub`] does, where the arguments are described.

    Weights, configuration, code, a sample grid and the card go up, and nothing else. A card on the Hub that was edited
    by hand stays as it is; one in `run_dir` that was is published as it is, otherwise the new card is written there.
    """
    repo_id, existing_files = check_repository(repo_id, dict(pipeline.transformer.config), private, token, force)
    run_dir = find_run(pipeline, run_dir)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_repository(pipeline, folder, repo_id, run_dir, license)
        if "README.md" in existing_files and not is_as_written(read_remote(api, repo_id, "README.md")):
            logger.warning(
                f"The card of {repo_id} was edited by hand on the Hub and is kept: delete it there to have a new one."
            )
            (folder / "README.md").unlink()
        elif run_dir is not None:
            shutil.copyfile(folder / "README.md", run_dir / "README.md")
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(pipeline).__name__}",
            create_pr=create_pr,
            # Shards and pictures of an earlier upload would lie beside the new ones.
            delete_patterns=["transformer/*", "vae/*", "samples/*"],
        )
    return str(url)


def check_repository(
    repo_id: str,
    transformer_config: dict[str, Any],
    private: bool | None = None,
    token: str | None = None,
    force: bool = False,
) -> tuple[str, list[str]]:
    """
    Whether a flow of this configuration may be pushed to a repository, found out before anything is changed.

    Returns:
        `tuple`: the repository's id with its namespace, and the names of the files that it holds.
    Raises:
        ValueError: as [`FlowBackPipeline.push_to_hub`].
    """
    if token is None and get_token() is None:
        raise ValueError("There is no token to push with: run `hf auth login`, set HF_TOKEN, or give one.")
    api = HfApi(token=token)
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return repo_id, []
    except HfHubHTTPError as error:
        raise ValueError(f"The Hub does not let `repo_id` {repo_id!r} be written: {error}") from error
    if private and not info.private:
        raise ValueError(
            f"`repo_id` {repo_id!r} exists and is public, but `private` is True: make it private on the Hub first, or"
            " choose another."
        )
    files = [sibling.rfilename for sibling in info.siblings]
    if force or not any(name.endswith((".json", ".safetensors", ".bin")) for name in files):
        return repo_id, files
    remote_config = {}
    if "transformer/config.json" in files:
        remote_config = json.loads(read_remote(api, repo_id, "transformer/config.json"))
    different = sorted(
        name
        for name in remote_config.keys() | transformer_config.keys()
        if not name.startswith("_") and remote_config.get(name) != transformer_config.get(name)
    )
    if different:
        raise ValueError(
            f"`repo_id` {repo_id!r} exists and holds a model of another configuration, which differs in"
            f" {', '.join(different)}: choose another, or replace it with `force` (--force)."
        )
    return repo_id, files


def read_remote(api: HfApi, repo_id: str, name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo_id, name, local_dir=folder)).read_text(encoding="utf-8")


def find_run(pipeline: "pipeline_flowback.FlowBackPipeline", run_dir: str | os.PathLike | None) -> Path | None:
    if run_dir is None:
        loaded_from = pipeline.config.get("_name_or_path")
        is_run = loaded_from and Path(loaded_from, "training_args.json").exists()
        return Path(loaded_from) if is_run else None
    if not Path(run_dir, "training_args.json").exists():
        raise ValueError(f"`run_dir` must be an output folder of training/train_rra.py, but {str(run_dir)!r} is not.")
    return Path(run_dir)


def write_repository(
    pipeline: "pipeline_flowback.FlowBackPipeline",
    folder: Path,
    repo_id: str,
    run_dir: Path | None = None,
    license: str = "apache-2.0",
):
    """Everything that a repository holds: weights, configurations without local paths, code, sample grid and card."""
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = [PIPELINE_MODULE, "FlowBackPipeline"]
    index["transformer"] = [TRANSFORMER_MODULE, "TarFlowTransformer2DModel"]
    write_config(folder / "model_index.json", index)
    shutil.copyfile(inspect.getfile(pipeline_flowback), folder / f"{PIPELINE_MODULE}.py")
    shutil.copyfile(inspect.getfile(transformer_tarflow), folder / "transformer" / f"{TRANSFORMER_MODULE}.py")
    for config_file in folder.glob("*/config.json"):
        write_config(config_file, json.loads(config_file.read_text()))

    grid = None if run_dir is None else newest_grid(run_dir)
    if grid is not None:
        (folder / "samples").mkdir()
        shutil.copyfile(grid, folder / "samples" / grid.name)
    edited_card = None if run_dir is None else read_edited_card(run_dir)
    card = edited_card or render_model_card(pipeline, repo_id, run_dir, license)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_config(path: Path, config: dict[str, Any]):
    """Without the folder of this machine that it was loaded from."""
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "_name_or_path"}, indent=2))


def newest_grid(run_dir: Path) -> Path | None:
    return max(run_dir.glob("samples/step-*.png"), default=None)


# Cards


def read_edited_card(run_dir: Path) -> str | None:
    """The card in a run's folder, if a person has changed it or written it."""
    path = run_dir / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else None
    return None if text is None or is_as_written(text) else text


def is_as_written(card: str) -> bool:
    """Whether a card still is what [`render_model_card`] wrote: it ends with the hash of what stands before."""
    match = HASH_LINE.search(card)
    return match is not None and match[1] == hash_of(card[: match.start()])


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def render_model_card(
    pipeline: "pipeline_flowback.FlowBackPipeline",
    repo_id: str,
    run_dir: Path | None = None,
    license: str = "apache-2.0",
) -> str:
    """
    A model card with metadata, from the pipeline and, where there is a run, from its files: `training_args.json`,
    `metrics.jsonl`, `samples/`, and `evaluation.json` if there is one. It says nothing that they do not, and names no
    local path. Its last line is the hash of the rest.
    """
    args = read_json(run_dir, "training_args.json") or {}
    metrics = read_metrics(run_dir)
    evaluation = read_json(run_dir, "evaluation.json")
    config, id2label = pipeline.transformer.config, pipeline.config.id2label or {}
    aligned = args.get("alignment", "none") != "none"
    grid = None if run_dir is None else newest_grid(run_dir)
    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["flowback_hf", "normalizing-flow", "tarflow", "image-generation", *(["r-repa"] if aligned else [])],
        datasets=hub_id(data_of(args)) if args else None,
        base_model=hub_id(teacher_of(args)) if aligned else None,
    )
    template = resources.files("flowback_hf").joinpath("model_card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        card_data,
        template_str=template,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        summary=summary(pipeline, aligned),
        call=example_call(config, id2label),
        guidance=about_guidance(pipeline),
        grid=None if grid is None else f"samples/{grid.name}",
        grid_caption=None if grid is None else about_grid(grid, args, config),
        model_table=markdown_table(model_settings(pipeline)),
        classes=", ".join(id2label.values()) if 0 < len(id2label) <= MAX_NAMED_CLASSES else None,
        training_table=markdown_table(training_settings(args, metrics, run_dir)) if args else None,
        metrics_table=markdown_table(measured(metrics)) if metrics else None,
        metrics_how=about_metrics(args, aligned),
        evaluation_table=markdown_table(flatten(evaluation)) if evaluation else None,
        aligned=aligned,
        limits=limits(pipeline),
    )
    text = str(card).rstrip("\n")
    return f"{text}\n\n<!-- flowback_hf: written by hub.py, sha256 {hash_of(text)} -->\n"


def read_json(run_dir: Path | None, name: str) -> dict[str, Any] | None:
    path = None if run_dir is None else run_dir / name
    return json.loads(path.read_text()) if path is not None and path.exists() else None


def read_metrics(run_dir: Path | None) -> list[dict[str, float]]:
    path = None if run_dir is None else run_dir / "metrics.jsonl"
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def hub_id(source: str | None) -> str | None:
    """A data set or model of the Hub; `None` for a folder or a file of this machine."""
    if source is None or os.path.exists(source) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return None
    return source


def portable(source: str) -> str:
    """What a source may be called in public: an id of the Hub, or the last two parts of a path."""
    if hub_id(source) is not None:
        return f"`{source}`"
    return f"`{'/'.join(Path(os.path.abspath(source)).parts[-2:])}`"


def summary(pipeline: "pipeline_flowback.FlowBackPipeline", aligned: bool) -> str:
    config = pipeline.transformer.config
    size = config.sample_size * pipeline.vae_scale_factor
    kind = "An unconditional" if config.num_classes is None else f"A class-conditional ({config.num_classes} classes)"
    grey = "grey " if pipeline.vae is None and config.in_channels == 1 else ""
    text = (
        f"{kind} normalizing flow of {size}×{size} {grey}images"
        f"{'' if pipeline.vae is None else ', in the latent space of a VAE'}: a"
        " [TARFlow](https://arxiv.org/abs/2412.06329)"
    )
    if aligned:
        text += (
            " whose hidden states were aligned with a vision encoder's features ([Flowing"
            " Backwards](https://arxiv.org/abs/2511.22345))"
        )
    return f"{text}. It draws images, gives their exact log-density, and inverts exactly."


def example_call(config: Any, id2label: dict[str, str]) -> str:
    if config.num_classes is None:
        return "num_images_per_prompt=4, "
    label = next(iter(id2label.values()), None)
    labels = json.dumps([0 if label is None else label.split(",")[0].strip()], ensure_ascii=False)
    return f"class_labels={labels}, num_images_per_prompt=4, "


def about_guidance(pipeline: "pipeline_flowback.FlowBackPipeline") -> str:
    scale, rule = pipeline.config.guidance_scale, pipeline.config.guidance_rule
    if scale == 1.0:
        return "Guidance is off unless `guidance_scale` is given (1.0 is off)."
    return f"`guidance_scale` is {scale:g} with the {rule} rule unless a call says otherwise; 1.0 is off."


def about_grid(grid: Path, args: dict[str, Any], config: Any) -> str:
    text = f"Drawn by the training script at step {int(grid.stem.removeprefix('step-'))}, seed {args['seed']}"
    if config.num_classes is None:
        return f"{text}; not selected."
    return f"{text}, one row a class, `guidance_scale={args['validation_guidance_scale']:g}`; not selected."


def model_settings(pipeline: "pipeline_flowback.FlowBackPipeline") -> dict[str, Any]:
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
        "noise of training": noise,
    }


def training_settings(args: dict[str, Any], metrics: list[dict[str, float]], run_dir: Path | None) -> dict[str, Any]:
    settings = {"data": about_data(args)}
    flips = "flipped at random" if args["random_flip"] else "not flipped"
    settings["augmentation"] = f"{flips}; {args['label_dropout']:.0%} of the labels dropped"
    if args["alignment"] != "none":
        order = f", order {args['alignment_order'] or 0}" if args["alignment"] == "reverse" else ""
        settings["alignment"] = f"{args['alignment']}{order}, weight {args['alignment_weight']:g}"
        settings["aligned places"] = ", ".join(aligned_places(metrics))
        settings["teacher"] = portable(teacher_of(args))
    steps = max((record["step"] for record in metrics), default=None)
    settings["steps"] = steps if steps is not None else args["max_train_steps"]
    accumulated = (
        f", {args['gradient_accumulation_steps']} accumulated" if args["gradient_accumulation_steps"] > 1 else ""
    )
    settings["batch size"] = f"{args['train_batch_size']} per process{accumulated}"
    settings["optimizer"] = (
        f"AdamW ({args['adam_beta1']:g}, {args['adam_beta2']:g}), learning rate {args['learning_rate']:g},"
        f" {args['lr_scheduler']} after {args['lr_warmup_steps']} steps of warm-up, weight decay"
        f" {args['adam_weight_decay']:g}, gradients clipped to {args['max_grad_norm']:g}"
    )
    settings["averaged weights"] = f"decay {args['ema_decay']:g}" if args["use_ema"] else "no"
    settings["precision"] = args["mixed_precision"] or "as configured in Accelerate"
    settings["seed"] = args["seed"]
    return settings


def teacher_of(args: dict[str, Any]) -> str:
    """Of a run that names none, the one whose features were stored, or the training script's default."""
    stored = {"teacher_features": "features.json", "latents": "latents.json"}
    for option, file in stored.items():
        if args.get(option) is not None:
            teacher = (read_json(Path(args[option]), file) or {}).get("teacher")
            if teacher is not None:
                return teacher
    return args.get("teacher_model_name_or_path") or DEFAULT_TEACHER


def data_of(args: dict[str, Any]) -> str:
    """The data set's id or place; of latents, that of the images they were made of."""
    if args.get("latents") is not None:
        return (read_json(Path(args["latents"]), "latents.json") or {}).get("data", args["latents"])
    return args["dataset_name"] or os.path.abspath(args["train_data_dir"])


def about_data(args: dict[str, Any]) -> str:
    source = data_of(args)
    text = portable(source)
    if args.get("latents") is not None:
        settings = read_json(Path(args["latents"]), "latents.json") or {}
        text += (
            " in latent space"
            if not settings
            else (f" at {settings['resolution']}×{settings['resolution']}, as latents of {portable(settings['vae'])}")
        )
    demo = read_json(Path(source).parent, "demo.json")
    if demo is not None:
        text += (
            f", made by `training/prepare_demo.py --kind {demo['kind']}`: {demo['num_train_images']} images to train"
            f" on, {demo['num_validation_images']} to validate with"
        )
    return text


def aligned_places(metrics: list[dict[str, float]]) -> list[str]:
    names = {name for record in metrics for name in record if name.startswith("cosine_similarity/")}
    places = sorted(tuple(map(int, re.findall(r"\d+", name))) for name in names)
    return [f"block {block} layer {layer}" for block, layer in places]


def measured(metrics: list[dict[str, float]]) -> dict[str, Any]:
    """The last of what was logged, and the validation likelihood of the untrained flow beside it."""
    table = {}
    validations = [record for record in metrics if "validation_nll" in record]
    if validations:
        first, last = validations[0], validations[-1]
        table["validation nll, nats per dimension"] = f"{last['validation_nll']:.4f} (step {last['step']})"
        if first is not last:
            table[f"the same at step {first['step']}"] = f"{first['validation_nll']:.4f}"
        if "validation_bits_per_dim" in last:
            table["validation bits per dimension"] = f"{last['validation_bits_per_dim']:.4f}"
    for record in reversed(metrics):
        cosines = {name: value for name, value in record.items() if name.startswith("cosine_similarity/")}
        if cosines:
            for name, value in cosines.items():
                block, layer = re.findall(r"\d+", name)
                table[f"cosine similarity, block {block} layer {layer}"] = f"{value:.4f}"
            break
    return table


def about_metrics(args: dict[str, Any], aligned: bool) -> str:
    weights = "averaged" if args.get("use_ema") else "last"
    text = (
        f"The likelihood is that of validation images (at most {args.get('max_validation_samples')}) with the noise of"
        f" training, once each, under the {weights} weights; lower is better."
    )
    if aligned:
        text += " Cosines are those of projected hidden states and the teacher's features in the last logged batch."
    return text


def flatten(evaluation: Any, prefix: str = "") -> dict[str, Any]:
    """Numbers and words of nested tables, each under its path."""
    if isinstance(evaluation, dict):
        entries = evaluation.items()
    elif isinstance(evaluation, list):
        entries = enumerate(evaluation, start=1)
    else:
        if isinstance(evaluation, float):
            return {prefix: f"{evaluation:.5g}"}
        return {prefix: re.sub(r"(?<!\S)/\S+", lambda path: "/".join(Path(path[0]).parts[-2:]), str(evaluation))}
    table = {}
    for name, value in entries:
        table |= flatten(value, f"{prefix} / {name}" if prefix else str(name))
    return table


def limits(pipeline: "pipeline_flowback.FlowBackPipeline") -> str:
    config = pipeline.transformer.config
    size = config.sample_size * pipeline.vae_scale_factor
    sentences = [
        "For research on generative models with exact likelihoods, and for teaching. The flow knows the images it was"
        f" trained on and no others: it draws {size}×{size} pixels of their kind, with their gaps and biases, and is"
        " no source of facts about anybody or anything."
    ]
    if config.noise_type == "gaussian" and config.noise_std > 0:
        sentences.append(
            f"It was trained on images with Gaussian noise (σ = {config.noise_std:g}), so its densities are those of"
            " noisy images; the pipeline takes the noise off its samples (`denoise=False` leaves it on)."
        )
    if pipeline.vae is not None:
        sentences.append(
            "Densities are those of the VAE's latents, not of pixels, and decoding loses what the VAE does."
        )
    if config.num_classes is not None:
        sentences.append("Strong guidance makes classes plainer and costs variety.")
    return " ".join(sentences)


def markdown_table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def load_pipeline(pipeline_class, model: str):
    """Load a saved or pushed pipeline. Raises ValueError if there is none."""
    try:
        return pipeline_class.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"`--model` must be a folder that holds a saved pipeline, or its id on the Hub, but {str(model)!r} is no"
            " such folder and could not be loaded from the Hub."
        ) from error
