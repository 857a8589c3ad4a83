# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Publishing the page of a flow as a Space on the Hub, which has no package flowback_hf."""

import os
import re
import shutil
import tempfile
from importlib.metadata import requires
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from flowback_hf.files import write_text


logger = logging.get_logger(__name__)

# The lower bound of the extra `app`.
GRADIO_VERSION = "6.31.0"
# What the page and the code in the flow's repository import.
PACKAGES = ("torch", "diffusers")

# The flow's own code comes from its repository, as diffusers loads it; `page.py` is a copy of this package's.
APP = '''"""The page of the flow {model_id}."""

from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

from page import FlowPage, launch


MODEL = "{model_id}"

pipeline = DiffusionPipeline.from_pretrained(MODEL, trust_remote_code=True)
classifier_class = get_class_from_dynamic_module(
    MODEL,
    module_file="pipeline_flowback_classification.py",
    class_name="FlowBackClassificationPipeline",
    trust_remote_code=True,
)
page = FlowPage(pipeline, classifier_class.from_pipe(pipeline), title=MODEL)

if __name__ == "__main__":
    launch(page.build())
'''

CARD = """---
title: {title}
emoji: 🌊
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio_version}
app_file: app.py
models:
  - {model_id}
---

# {title}

The page of the flow [{model_id}](https://huggingface.co/{model_id}): it draws images, says how likely an image is and
which class it has, turns images into noise and back without loss, and edits them in between.

`app.py` runs the code in the repository of the flow (`trust_remote_code=True`).
"""


def write_space(folder: str | os.PathLike, model_id: str):
    """
    Write the files of a Space: the page, its requirements and its card.

    Args:
        folder (`str`): The folder to write to. It is created if it does not exist.
        model_id (`str`): The repository of the flow, as [`FlowBackPipeline.push_to_hub`] publishes it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"model_id": model_id, "title": model_id.partition("/")[2], "gradio_version": GRADIO_VERSION}
    write_text(folder / "app.py", APP.format(**names))
    write_text(folder / "README.md", CARD.format(**names))
    requirements = [each for each in requires("flowback_hf") if re.split("[<>=!; ]", each)[0] in PACKAGES]
    write_text(folder / "requirements.txt", "\n".join(requirements) + "\n")
    shutil.copyfile(Path(__file__).with_name("page.py"), folder / "page.py")


def check_space(space_id: str, private: bool | None = None, token: str | None = None) -> str:
    """
    Check that a Space may be written to, before anything is published.

    Args:
        space_id, private, token: As in [`push_space`].
    Returns:
        `str`: the name of the Space with its namespace.
    Raises:
        ValueError: if the Hub cannot be reached, or if the Space is public and must not be.
    """
    api = HfApi(token=token)
    try:
        if "/" not in space_id:
            space_id = f"{api.whoami()['name']}/{space_id}"
        is_public = private and api.repo_exists(space_id, repo_type="space") and not api.space_info(space_id).private
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(f"`space_id` {space_id!r} on the Hub cannot be written to: {error}") from error
    if is_public:
        raise ValueError(
            f"`space_id` {space_id!r} exists and is public, but `private` is True. Make it private on the Hub first,"
            " or choose another."
        )
    return space_id


def push_space(space_id: str, model_id: str, private: bool | None = None, token: str | None = None) -> str:
    """
    Publish the page of a flow as a Space. An existing Space keeps its card.

    Args:
        space_id (`str`): `"name"` in the token's own namespace, or `"organization/name"`.
        model_id (`str`): The repository of the flow, which must exist.
        private (`bool`, *optional*): Create a private Space.
        token (`str`, *optional*): A token with write access. By default, that of `hf auth login` or `HF_TOKEN`.
    Returns:
        `str`: the address of the Space.
    Raises:
        ValueError: if there is no such flow, if the Space cannot be written to, or if it is public and must not be.
    """
    api, space_id = HfApi(token=token), check_space(space_id, private, token)
    try:
        if not api.file_exists(model_id, "pipeline_flowback_classification.py"):
            raise ValueError(
                f"The Space needs a flow on the Hub, but {model_id!r} is not one. Publish the flow with"
                " pipelines/push_to_hub.py first."
            )
        keeps_card = api.file_exists(space_id, "README.md", repo_type="space")
        url = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            write_space(folder, model_id)
            if keeps_card:
                logger.warning(f"{space_id} keeps its card. The page needs `sdk_version: {GRADIO_VERSION}` there.")
                Path(folder, "README.md").unlink()
            api.upload_folder(
                repo_id=space_id,
                folder_path=folder,
                repo_type="space",
                commit_message="Upload the page of a flow",
            )
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(f"`space_id` {space_id!r} on the Hub cannot be written to: {error}") from error
    return str(url)
