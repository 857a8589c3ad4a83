# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Publishing pipelines on the Hub, as repositories that load with this package and without it; and loading them."""

import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from flowback_hf.files import read_json, write_json, write_text
from flowback_hf.model_card import Run, find_run, is_as_written, read_edited_card, render_model_card
from flowback_hf.models import transformer_reverse, transformer_tarflow
from flowback_hf.pipelines import modular_flowback, pipeline_flowback, pipeline_flowback_classification


logger = logging.get_logger(__name__)

# The code files of a repository, without their endings. Code from all repositories shares one namespace, so the names
# must be distinctive.
PIPELINE_MODULE = "pipeline_flowback"
TRANSFORMER_MODULE = "transformer_tarflow"
REVERSE_TRANSFORMER_MODULE = "transformer_reverse"
# Where a repository keeps the modules of this package, for those that import others.
REPOSITORY_MODULES = {
    transformer_tarflow: f"transformer.{TRANSFORMER_MODULE}",
    transformer_reverse: f"reverse_transformer.{REVERSE_TRANSFORMER_MODULE}",
    pipeline_flowback: PIPELINE_MODULE,
    pipeline_flowback_classification: "pipeline_flowback_classification",
    modular_flowback: "modular_flowback",
}


# Loading


def load_pipeline(
    pipeline_class: type[DiffusionPipeline],
    model: str | os.PathLike,
    option: str = "--model",
    cache_dir: str | None = None,
) -> DiffusionPipeline:
    """
    Load the pipeline that a script's option names.

    Args:
        pipeline_class (`type`): [`FlowBackPipeline`] or [`FlowBackClassificationPipeline`].
        model (`str`): A folder that holds a saved pipeline, or its id on the Hub. A folder wins.
        option (`str`, defaults to `"--model"`): The option, for messages.
        cache_dir (`str`, *optional*): Where pipelines of the Hub are kept.
    Returns:
        [`~diffusers.DiffusionPipeline`]: a pipeline of this class, on the CPU.
    Raises:
        ValueError: if there is no such folder and no such repository. The message says what was looked for, and where.

    Example:
        ```py
        >>> import tempfile
        >>> from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline, TarFlowTransformer2DModel
        >>> from flowback_hf.hub import load_pipeline

        >>> flow = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=16
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> FlowBackPipeline(flow).save_pretrained(folder)
        >>> load_pipeline(FlowBackClassificationPipeline, folder).image_size
        8
        ```
    """
    model = os.fspath(model)
    folder = Path(model).resolve()
    rule = f"`{option}` must be a folder that holds a saved pipeline, or its id on the Hub, but {model!r} is neither:"
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{rule} there is no model_index.json in {folder}.")
        try:
            return pipeline_class.from_pretrained(model)
        except OSError as error:
            raise ValueError(
                f"`{option}` {model!r} was not loaded: {str(error).strip()} A file is missing, truncated or damaged:"
                " save or download the pipeline again."
            ) from error
    if not is_repo_id(model):
        raise ValueError(f"{rule} there is no folder {folder}, and an id has the form 'user/name'.")
    try:
        return pipeline_class.from_pretrained(model, cache_dir=cache_dir)
    except OSError as error:
        raise ValueError(
            f"{rule} there is no folder {folder}, and no such pipeline was found on the Hub ({constants.ENDPOINT}) or"
            f" in its cache ({cache_dir or constants.HF_HUB_CACHE}). Without a network, or with HF_HUB_OFFLINE set,"
            " only the cache is searched."
        ) from error


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub may have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# Publishing


def push_to_hub(
    pipeline: pipeline_flowback.FlowBackPipelineMixin,
    repo_id: str,
    commit_message: str | None,
    private: bool | None,
    token: str | None,
    create_pr: bool,
    *,
    run_dir: str | os.PathLike | None,
    license: str,
    force: bool,
) -> str:
    """
    Publish a pipeline. [`FlowBackPipeline.push_to_hub`] calls this, and documents the arguments and their defaults.

    It uploads weights, configurations, code, a sample grid and the card, and nothing else. It never overwrites a card
    that a person edited: an edited card on the Hub stays, and one in the run's folder is published as it is. Otherwise
    it writes the new card to the run's folder, too.
    """
    repo_id, existing_files = check_repository(repo_id, dict(pipeline.transformer.config), private, token, force)
    run_dir = find_run(pipeline, run_dir)
    pipeline = pipeline_flowback.FlowBackPipeline.from_pipe(pipeline)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_repository(pipeline, folder, repo_id, run_dir, license)
        card = folder / "README.md"
        if "README.md" in existing_files and not is_as_written(read_remote_card(api, repo_id)):
            logger.warning(
                f"The card of {repo_id} was edited by hand on the Hub and is kept. Delete it there to get a new one."
            )
            card.unlink()
        elif run_dir is not None:
            write_text(run_dir / "README.md", card.read_text(encoding="utf-8"))
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(pipeline).__name__}",
            create_pr=create_pr,
            # Otherwise, weight shards and pictures of an earlier upload would remain beside the new ones.
            delete_patterns=["transformer/*", "reverse_transformer/*", "vae/*", "samples/*"],
        )
        if card.exists() and is_as_written(card.read_text(encoding="utf-8")) and not create_pr:
            # A commit cannot name itself, so a second one adds the revision of code and weights to the card.
            write_text(card, render_model_card(pipeline, repo_id, run_dir, license, revision=commit.oid))
            api.upload_file(
                path_or_fileobj=card,
                path_in_repo=card.name,
                repo_id=repo_id,
                commit_message="Recommend this revision in the card",
            )
            if run_dir is not None:
                shutil.copyfile(card, run_dir / card.name)
    return str(url)


def publish(
    pipeline: pipeline_flowback.FlowBackPipeline,
    repo_id: str,
    output_dir: str | os.PathLike,
    private: bool | None,
    token: str | None,
):
    """Push the pipeline of a run that has just ended, and say how to try again if that fails."""
    try:
        url = pipeline.push_to_hub(repo_id, run_dir=output_dir, private=private, token=token)
    except Exception as error:
        error.add_note(
            f"The pipeline is saved in {output_dir}, but could not be published. Try again with"
            f" pipelines/push_to_hub.py --model {output_dir} --hub_model_id {repo_id}."
        )
        raise
    print(f"Published {url}.")


def check_repository(
    repo_id: str,
    transformer_config: dict[str, Any],
    private: bool | None = None,
    token: str | None = None,
    force: bool = False,
) -> tuple[str, list[str]]:
    """
    Check that a flow of this configuration may be pushed to a repository. Nothing on the Hub is changed.

    Args:
        repo_id (`str`): `"name"` in the token's own namespace, or `"organization/name"`.
        transformer_config (`dict`): The flow's configuration.
        private (`bool`, *optional*): Refuse a repository that is public.
        token (`str`, *optional*): A token with write access. By default, that of `hf auth login` or `HF_TOKEN`.
        force (`bool`, defaults to `False`): Accept a repository that holds a model of another configuration.
    Returns:
        `tuple[str, list[str]]`: the repository's id with its namespace, and the names of the files in it.
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
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(f"`repo_id` {repo_id!r} on the Hub cannot be written to: {error}") from error
    if private and not info.private:
        raise ValueError(
            f"`repo_id` {repo_id!r} exists and is public, but `private` is True. Make it private on the Hub first, or"
            " choose another."
        )
    files = [sibling.rfilename for sibling in info.siblings]
    if force or not any(name.endswith((".json", ".safetensors", ".bin")) for name in files):
        return repo_id, files
    remote_config, own_config = {}, json.loads(json.dumps(transformer_config))
    if "transformer/config.json" in files:
        with tempfile.TemporaryDirectory() as folder:
            remote_config = read_json(api.hf_hub_download(repo_id, "transformer/config.json", local_dir=folder))
    different = sorted(
        name
        for name in (remote_config.keys() | own_config.keys()) - {"inverse_profile"}  # says nothing of the model
        if not name.startswith("_") and remote_config.get(name) != own_config.get(name)
    )
    if different:
        raise ValueError(
            f"`repo_id` {repo_id!r} exists and holds a model of another configuration, which differs in"
            f" {', '.join(different)}. Choose another, or replace it with `force` (--force)."
        )
    return repo_id, files


def read_remote_card(api: HfApi, repo_id: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo_id, "README.md", local_dir=folder)).read_text(encoding="utf-8")


def write_repository(
    pipeline: pipeline_flowback.FlowBackPipeline,
    folder: str | os.PathLike,
    repo_id: str,
    run_dir: str | os.PathLike | None = None,
    license: str = "apache-2.0",
):
    """
    Write all files of a repository: weights, configurations without local paths, code, a sample grid and the card.

    Args:
        pipeline ([`FlowBackPipeline`]): The pipeline.
        folder (`str`): The folder to write to. It is created if it does not exist.
        repo_id (`str`): The repository's id, for the card.
        run_dir (`str`, *optional*):
            The output folder of `training/train_rra.py`. Its newest sample grid is copied and its files fill the card.
            If its `README.md` was edited by hand, that is the card.
        license (`str`, defaults to `"apache-2.0"`): The license of the weights, for the card's metadata.
    """
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    index = read_json(folder / "model_index.json")
    index["_class_name"] = [PIPELINE_MODULE, "FlowBackPipeline"]
    index["transformer"] = [TRANSFORMER_MODULE, "TarFlowTransformer2DModel"]
    if pipeline.reverse_transformer is not None:
        index["reverse_transformer"] = [REVERSE_TRANSFORMER_MODULE, "TarFlowReverseTransformer2DModel"]
        copy_heads(folder, run_dir)
    write_config(folder / "model_index.json", index)
    for module, name in REPOSITORY_MODULES.items():
        code_file = folder / f"{name.replace('.', '/')}.py"
        code_file.parent.mkdir(exist_ok=True)
        write_text(code_file, repository_code(module))
    write_modular_files(folder, repo_id, index)
    for config_file in folder.glob("*/config.json"):
        write_config(config_file, read_json(config_file))

    grid = Run.read(run_dir).grid
    if grid is not None:
        (folder / "samples").mkdir()
        shutil.copyfile(grid, folder / "samples" / grid.name)
    edited_card = None if run_dir is None else read_edited_card(run_dir)
    write_text(folder / "README.md", edited_card or render_model_card(pipeline, repo_id, run_dir, license))


def copy_heads(folder: Path, run_dir: str | os.PathLike | None):
    """Copy the learned inverse's heads from a run's folder, unless the pipeline had them and has saved them."""
    name = f"reverse_transformer/{transformer_reverse.HEADS_FILE}"
    if run_dir is not None and Path(run_dir, name).exists() and not (folder / name).exists():
        shutil.copyfile(Path(run_dir, name), folder / name)


def repository_code(module: ModuleType) -> str:
    """Read a module of this package, and let it import the repository's modules instead of this package's."""
    code = Path(inspect.getfile(module)).read_text(encoding="utf-8")
    for imported, name in REPOSITORY_MODULES.items():
        code = code.replace(f"from {imported.__name__} import", f"from .{name} import")
    return code


def write_modular_files(folder: Path, repo_id: str, index: dict[str, Any]):
    """
    Write what `ModularPipeline.from_pretrained` reads: which class is the blocks', and where the components are.

    Args:
        folder (`pathlib.Path`): The repository.
        repo_id (`str`): Its id.
        index (`dict`): The content of `model_index.json`.
    """
    blocks = modular_flowback.FlowBackBlocks()
    blocks.save_pretrained(folder)
    modular_index = {
        "_class_name": "ModularPipeline",
        "_blocks_class_name": type(blocks).__name__,
        "_diffusers_version": index["_diffusers_version"],
        **{spec.name: index[spec.name] for spec in blocks.expected_configs},
    }
    for spec in blocks.expected_components:
        if index[spec.name][1] is not None:
            type_hint = ["diffusers", index[spec.name][1]]
            source = {"pretrained_model_name_or_path": repo_id, "subfolder": spec.name, "type_hint": type_hint}
            modular_index[spec.name] = [*type_hint, source]
    write_json(folder / "modular_model_index.json", modular_index)


def write_config(path: Path, config: dict[str, Any]):
    """Write a configuration without `_name_or_path`, the local folder that it was loaded from."""
    write_json(path, {name: value for name, value in config.items() if name != "_name_or_path"})
