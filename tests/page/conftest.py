import contextlib
import os

import pytest
import torch
from gradio_client import Client

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.page import FlowPage, launch


def make_page(model, id2label: dict[int, str] | None = None) -> FlowPage:
    guidance_scale = 1.0 if model.config.num_classes is None else 1.1
    pipeline = FlowBackPipeline(model.float(), id2label=id2label, guidance_scale=guidance_scale)
    return FlowPage(pipeline, FlowBackClassificationPipeline.from_pipe(pipeline), "A tiny flow")


@pytest.fixture(scope="package")
def page(randomised_model):
    """The page of a tiny flow of grey images, with five classes."""
    names = dict(enumerate(("cat", "dog", "cow", "emu", "<img src=x onerror=alert(1)>")))
    return make_page(randomised_model(sample_size=8, in_channels=1), names)


@pytest.fixture(scope="package")
def address(page, tmp_path_factory):
    """Where the page is served."""
    # As pipelines/app.py does: pages that share a folder delete each other's files.
    os.environ.setdefault("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    blocks = page.build()
    for attempt in range(5):  # Gradio gives its server three seconds to answer, too few on a busy machine
        with contextlib.suppress(ValueError):
            launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
            break
    yield blocks.local_url
    blocks.close()


@pytest.fixture
def client(address):
    """A user of the page."""
    client = Client(address, verbose=False)
    yield client
    client.close()


@pytest.fixture
def image_file(page, tmp_path):
    """A file with an image that the flow draws, of its size."""
    path = tmp_path / "image.png"
    page.pipeline([1], generator=torch.Generator().manual_seed(1)).images[0].save(path)
    return path
