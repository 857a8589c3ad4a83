"""What the page computes, through its interface for programs, and how it answers mistakes."""

import html
import socket
import sys
import threading
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import PIL.Image
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline, TarFlowReverseTransformer2DModel
from flowback_hf import page as page_module

from ..conftest import REPOSITORY, command_line, end_of_command, load_script
from .conftest import make_page


def read(path: str) -> torch.Tensor:
    return torch.tensor(np.array(PIL.Image.open(path)))


def read_gallery(gallery: list[dict]) -> torch.Tensor:
    return torch.stack([read(entry["image"]) for entry in gallery])


def pixels(images: list[PIL.Image.Image]) -> torch.Tensor:
    return torch.stack([torch.tensor(np.array(image)) for image in images])


# What it computes: the same as the pipelines


def test_sample_shows_every_block_and_ends_with_the_images_of_the_pipeline(page, client):
    job = client.submit([1, 3], 1.2, 7, 3, "sequential", api_name="/sample")
    expected = page.pipeline(
        class_labels=[1, 3, 1], guidance_scale=1.2, generator=torch.Generator().manual_seed(7), solver="sequential"
    ).images
    assert torch.equal(read_gallery(job.result()), pixels(expected))
    shown = [read_gallery(gallery) for gallery in job.outputs()]
    assert len(shown) == page.pipeline.transformer.config.num_blocks + 1
    assert all(not torch.equal(one, other) for one, other in zip(shown, shown[1:]))


def test_a_learned_inverse_is_one_of_the_solvers(page):
    flow = page.pipeline.transformer
    other = make_page(flow)
    assert other.solvers == page.solvers and "learned" not in page.solvers
    learned = TarFlowReverseTransformer2DModel.for_flow(flow, max_guidance_scale=2.0)
    pipeline = FlowBackPipeline(flow, reverse_transformer=learned)
    other = page_module.FlowPage(pipeline, FlowBackClassificationPipeline.from_pipe(pipeline), "Two networks")
    assert other.solvers[-1] == "learned"
    *_, images = other.sample([1, 3], 1.5, 7, 3, "learned", progress=lambda *args, **options: None)
    generator = torch.Generator().manual_seed(7)
    expected = pipeline([1, 3, 1], guidance_scale=1.5, generator=generator, solver="learned").images
    assert torch.equal(pixels(images), pixels(expected))
    with pytest.raises(gr.Error, match="`guidance_scale` must be between 1.0 and 2.0, for which this learned inverse"):
        list(other.sample([1, 3], 2.5, 7, 3, "learned", progress=lambda *args, **options: None))
    (menu,) = [component for component in other.build().blocks.values() if getattr(component, "label", "") == "Solver"]
    assert [value for _, value in menu.choices] == list(other.solvers)


def test_classify(page, client, image_file):
    scores, facts, seen = client.predict(handle_file(image_file), api_name="/classify")
    expected = page.classifier(image_file, method="bayes")
    assert [entry["label"] for entry in scores["confidences"]] == [entry["label"] for entry in expected]
    shown = torch.tensor([entry["confidence"] for entry in scores["confidences"]])
    torch.testing.assert_close(shown, torch.tensor([entry["score"] for entry in expected]))
    assert f"{page.classifier.log_prob(image_file).item():.1f} nats" in facts
    assert torch.equal(read(seen), read(image_file))


def test_classes_of_the_same_name_are_shown_apart(randomised_model, image_file):
    names = dict(enumerate(("crane", "crane", "cow", "emu", "dog")))
    page = make_page(randomised_model(sample_size=8, in_channels=1), names)
    scores, _, _ = page._classify(PIL.Image.open(image_file))
    expected = page.classifier(image_file, method="bayes")
    assert len(scores) == 5 and list(scores.values()) == pytest.approx([entry["score"] for entry in expected])
    assert sum(name.startswith("crane") for name in scores) == 2


def test_a_drawing_is_classified_as_the_image_that_the_flow_sees(page, client, tmp_path):
    drawing = PIL.Image.new("RGB", (320, 320), "white")
    drawing.paste((0, 0, 0), (80, 80, 160, 240))
    drawing.save(tmp_path / "drawing.png")
    editor = {"background": None, "layers": [], "composite": handle_file(tmp_path / "drawing.png")}
    scores, facts, seen = client.predict(editor, api_name="/classify_drawing")
    expected = page.classifier(seen, method="bayes")
    assert scores["label"] == expected[0]["label"]
    # ink is as bright as what the flow draws: the page tells by the corners of its images
    ink, paper = read(seen)[3, 3].item(), read(seen)[0, 0].item()
    assert (ink > paper) == page.draws_light_on_dark


def test_invert_returns_the_image(page, client, image_file):
    seen, noise, restored, facts = client.predict(handle_file(image_file), 1, api_name="/invert")
    assert torch.equal(read(seen), read(image_file)) and torch.equal(read(restored), read(image_file))
    assert not torch.equal(read(noise), read(image_file)) and "class dog" in facts


def test_swap_vary_and_interpolate_are_those_of_the_pipeline(page, client, image_file):
    image = handle_file(image_file)
    _, swapped = client.predict(image, 1, 3, api_name="/swap_class")
    assert torch.equal(read(swapped), pixels(page.pipeline.swap_class(image_file, 1, 3).images)[0])

    varied = client.predict(image, 1, 0.3, 5, api_name="/vary")
    generator = torch.Generator().manual_seed(5)
    expected = page.pipeline.vary(image_file, 0.3, 1, num_images_per_prompt=len(varied), generator=generator).images
    assert torch.equal(read_gallery(varied), pixels(expected))

    frames = read_gallery(client.predict(image, 1, handle_file(page.examples[0]), api_name="/interpolate"))
    assert torch.equal(frames[0], read(image_file)) and torch.equal(frames[-1], read(page.examples[0]))
    assert len(frames.unique(dim=0)) > 5


def test_the_slider_shows_the_frame_at_its_position(page):
    frames = [PIL.Image.new("L", (1, 1), level) for level in range(11)]
    assert [page.show_frame(frames, position).getpixel((0, 0)) for position in (0, 0.5, 1)] == [0, 5, 10]
    assert page.show_frame([], 0.5) is None


def test_the_map_and_its_sum(page, client, image_file):
    likelihood, difference, facts = client.predict(handle_file(image_file), 1, api_name="/likelihood_map")
    nats = page.pipeline.likelihood_map(image_file, 1)[0]
    assert f"log p(image | class) = {nats.sum():.1f} nats" in facts
    lowest, highest = (divmod(index.item(), nats.shape[1]) for index in (nats.argmin(), nats.argmax()))
    patch = page.pipeline.transformer.config.patch_size
    colors = [read(likelihood)[row * patch, column * patch] for row, column in (lowest, highest)]
    assert colors[1][1] > colors[0][1]  # yellow has more green than violet
    assert read(difference).shape == (8, 8, 3)


def test_the_class_is_read_by_the_flow_if_none_is_chosen(page, client, image_file):
    read_class = page.classifier(image_file, method="bayes")[0]["label"]
    *_, facts = client.predict(handle_file(image_file), "read", api_name="/likelihood_map")
    assert f"class {html.escape(read_class)}" in facts


def test_two_users_get_what_each_asked_for(address, page):
    """At the same time, with different classes, guidance, seeds and solvers."""
    asked = [([0], 1.0, 1, 16, "sequential"), ([1, 3], 1.2, 7, 3, "jacobi")]
    results = [[], []]

    def use(number: int):
        client = Client(address, verbose=False)
        results[number] += [client.predict(*asked[number], api_name="/sample") for _ in range(2)]
        client.close()

    users = [threading.Thread(target=use, args=(number,)) for number in (0, 1)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    for (labels, scale, seed, number, solver), galleries in zip(asked, results):
        generator = torch.Generator().manual_seed(seed)
        labels = (labels * number)[:number]
        expected = page.pipeline(labels, guidance_scale=scale, generator=generator, solver=solver).images
        assert len(galleries) == 2
        assert all(torch.equal(read_gallery(gallery), pixels(expected)) for gallery in galleries)


def test_a_call_ends_early_if_nobody_waits(page):
    steps = page._call_in_steps(class_labels=[0])
    next(steps)
    steps.close()
    assert page.pipeline.interrupt


@pytest.mark.parametrize(
    "config", [{"in_channels": 3}, {"num_classes": None}, {"noise_std": 0.0}], ids=["colour", "no classes", "no noise"]
)
def test_other_flows_have_a_page(randomised_model, config, tmp_path):
    page = make_page(randomised_model(**config))
    page.build()
    image = {"path": page.examples[0]}
    *_, images = page.sample([], 1.0, 0, 2, "auto")
    assert len(images) == 2
    scores, facts, _ = page.classify(image)
    assert (scores is None) == (page.num_classes is None) and "nats" in facts
    assert "differs by at most" in page.invert(image, "read")[-1]
    assert len(page.interpolate(image, "read", image)[0]) == page_module.NUM_FRAMES
    assert "sum to" in page.likelihood_map(image, "read")[-1]


# Bad input: one sentence, and the page keeps running


def write_text(path: Path):
    path.write_text("not an image")


def write_truncated(path: Path):
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:500])


def write_huge(path: Path):
    PIL.Image.new("1", (8000, 8000)).save(path)


def write_bomb(path: Path):
    """Pillow itself refuses this one."""
    PIL.Image.new("1", (20000, 20000)).save(path)


def write_integers(path: Path):
    PIL.Image.new("I", (8, 8), 70000).save(path, format="TIFF")


FILES = {
    "text": (write_text, "The file cannot be read: it is not an image."),
    "truncated": (write_truncated, "The image cannot be read: "),
    "huge": (write_huge, "The image cannot be read: it has 8000x8000 pixels, more than 50 million."),
    "bomb": (write_bomb, "The image cannot be read: Image size (400000000 pixels) exceeds limit"),
    "32 bits": (write_integers, "Image 0 must have 8 or 16 bits, or floats in [0, 1], but has 32-bit integers"),
}
IMAGE_CALLS = {
    "/classify": (),
    "/invert": ("read",),
    "/swap_class": ("read", 1),
    "/vary": ("read", 0.5, 0),
    "/likelihood_map": ("read",),
}


def message_of(client: Client, *arguments, api_name: str) -> str:
    """The one sentence that a request is answered with."""
    with pytest.raises(AppError) as error:
        client.predict(*arguments, api_name=api_name)
    message = str(error.value)
    assert "\n" not in message.strip() and "Traceback" not in message and "/tmp" not in message
    return message


@pytest.mark.parametrize("write, sentence", FILES.values(), ids=FILES)
def test_files_that_cannot_be_used(write, sentence, client, tmp_path, image_file):
    write(tmp_path / "upload.png")
    assert message_of(client, handle_file(tmp_path / "upload.png"), api_name="/classify").startswith(sentence)
    client.predict(handle_file(image_file), api_name="/classify")


@pytest.mark.parametrize("api_name", IMAGE_CALLS)
def test_no_image_and_no_image_file(api_name, client, tmp_path):
    others = IMAGE_CALLS[api_name]
    assert message_of(client, None, *others, api_name=api_name).startswith("There is no image yet")
    write_text(tmp_path / "upload.png")
    upload = handle_file(tmp_path / "upload.png")
    assert message_of(client, upload, *others, api_name=api_name) == "The file cannot be read: it is not an image."


def test_the_image_that_is_missing_is_named(client, image_file):
    message = message_of(client, handle_file(image_file), 1, None, api_name="/interpolate")
    assert message.startswith("There is no other image yet")


@pytest.mark.parametrize("colour", ["white", (0, 0, 0, 0), None], ids=["white", "transparent", "nothing"])
def test_an_empty_canvas(client, colour, tmp_path):
    PIL.Image.new("RGBA", (320, 320), colour or 0).save(tmp_path / "canvas.png")
    composite = None if colour is None else handle_file(tmp_path / "canvas.png")
    editor = {"background": None, "layers": [], "composite": composite}
    assert message_of(client, editor, api_name="/classify_drawing") == "The canvas is empty: draw something first."


def notices_of(monkeypatch, function, *arguments) -> list[str]:
    notices = []
    monkeypatch.setattr(page_module.gr, "Info", notices.append)
    function(*arguments)
    return notices


def test_an_animation_and_another_size_are_used_with_a_notice(page, image_file, tmp_path, monkeypatch):
    frames = [PIL.Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    upload = {"path": str(tmp_path / "animation.gif")}
    notices = notices_of(monkeypatch, page.classify, upload)
    assert notices == ["Only the first of the 3 images of this animation is used."]

    PIL.Image.new("RGB", (640, 427), "red").save(tmp_path / "photo.jpg")
    notices = notices_of(monkeypatch, page.classify, {"path": str(tmp_path / "photo.jpg")})
    assert notices == ["The middle of the image, which has 640x427 pixels, is resized to 8x8."]
    assert notices_of(monkeypatch, page.classify, {"path": str(image_file)}) == []

    PIL.Image.new("RGBA", (100, 100), (255, 0, 0, 0)).save(tmp_path / "transparent.png")
    transparency, size = notices_of(monkeypatch, page.classify, {"path": str(tmp_path / "transparent.png")})
    assert "transparent parts" in transparency
    assert size == "The image, which has 100x100 pixels, is resized to 8x8."


def test_classes_of_an_unusual_image_mean_nothing(monkeypatch, page, image_file):
    assert "typical" in page.classify({"path": str(image_file)})[1]
    monkeypatch.setattr(page, "reference_log_prob", page.reference_log_prob + 1000)
    facts = page.classify({"path": str(image_file)})[1]
    assert "nothing like what the flow draws" in facts and "Do not rely on p(class)" in facts


NUMBERS = {
    "class of another model": ("/sample", ([99], 1.0, 0, 1, "auto"), "Value: 99"),
    "class of no model": ("/sample", (["umbrella"], 1.0, 0, 1, "auto"), "Value: 'umbrella'"),
    "too many images": ("/sample", ([], 1.0, 0, 999, "auto"), "Value 999 is greater than maximum value 16"),
    "guidance below 1": ("/sample", ([], 0.5, 0, 1, "auto"), "Value 0.5 is less than minimum value 1"),
    "negative seed": ("/sample", ([], 1.0, -1, 1, "auto"), "Value -1 is less than minimum value 0"),
    "unknown solver": ("/sample", ([], 1.0, 0, 1, "magic"), "Value: magic"),
    "overflow": ("/sample", ([4], 1.2, 2, 1, "auto"), "Images [0] of this call overflowed and are not finite."),
    "source of another model": ("/swap_class", ("IMAGE", 99, 1), "`source` must lie between 0 and 4"),
    "target of another model": ("/swap_class", ("IMAGE", 0, 99), "`target` must lie between 0 and 4"),
    "target that is a name": ("/swap_class", ("IMAGE", 0, "umbrella"), "`target` must be known names or numbers"),
    "strength above 1": ("/vary", ("IMAGE", 0, 1.5, 0), "`strength` must be a finite number of at least 0"),
    "strength below 0": ("/vary", ("IMAGE", 0, -0.1, 0), "`strength` must be a finite number of at least 0"),
    "seed that is no number": ("/vary", ("IMAGE", 0, 0.5, None), "`seed` must be a whole number from 0"),
    "class of the map": ("/likelihood_map", ("IMAGE", 99), "`class_labels` must lie between 0 and 4"),
}


@pytest.mark.parametrize("api_name, arguments, sentence", NUMBERS.values(), ids=NUMBERS)
def test_values_out_of_their_range(api_name, arguments, sentence, client, image_file):
    arguments = [handle_file(image_file) if each == "IMAGE" else each for each in arguments]
    assert sentence in message_of(client, *arguments, api_name=api_name)


def test_a_typical_image_that_overflows_is_left_out(monkeypatch, page, image_file):
    """Now and then a flow draws one, which must not stop its page."""
    draw = page_module.FlowPage._draw

    def overflow(self, num_images, **options):
        images = draw(self, num_images, **options)
        if options.get("output_type") == "pt":
            images[5] = torch.nan
        return images

    monkeypatch.setattr(page_module.FlowPage, "_draw", overflow)
    other = make_page(page.pipeline.transformer)
    assert len(other.reference_log_prob) == len(page.reference_log_prob) - 1
    _, facts, _ = other.classify({"path": str(image_file)})
    assert "nan" not in facts and other.reference_map.isfinite().all()


# Files and addresses


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", str(REPOSITORY / "setup.py"), "setup.py", "README.md"]
)
def test_files_of_the_machine_are_not_served(address, path):
    for route in ("gradio_api/file=", "gradio_api/file/", "file="):
        answer = httpx.get(f"{address}{route}{path}")
        assert answer.status_code in (403, 404), route


def test_files_of_the_machine_are_not_read_as_uploads(address, page, image_file):
    """Only uploads are: this image is none, and the service would leak files that are images."""
    payload = {"path": str(image_file), "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{address}gradio_api/call/classify", json={"data": [payload]}).json()
    answer = httpx.get(f"{address}gradio_api/call/classify/{call['event_id']}").text
    assert "event: error" in answer and "nats" not in answer


def test_a_large_file_is_refused(address):
    files = {"files": ("large.png", b"0" * (21 * 2**20))}
    answer = httpx.post(f"{address}gradio_api/upload", files=files)
    assert answer.status_code == 413 or "exceeded" in answer.text


# The command


SCRIPT = REPOSITORY / "pipelines" / "app.py"


def end_of_app(monkeypatch, **options) -> str:
    return end_of_command(SCRIPT, command_line(**options), monkeypatch)


def test_without_a_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert end_of_app(monkeypatch).endswith("`make quickstart` trains that flow.")
    (tmp_path / "empty").mkdir()
    assert "there is no model_index.json" in end_of_app(monkeypatch, model="empty")


def test_an_address_that_is_not_free(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        end = end_of_app(monkeypatch, model="a/b", server_port=port)
        assert f"`--server_port` {port}" in end and "in use" in end
    assert "`--server_name` 192.0.2.1" in end_of_app(monkeypatch, model="a/b", server_name="192.0.2.1")


def test_gradio_is_missing(monkeypatch, tmp_path, page):
    page.pipeline.save_pretrained(tmp_path / "flow")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flowback_hf.page")
    assert 'pip install "flowback_hf[app]"' in end_of_app(monkeypatch, model=tmp_path / "flow")


def test_a_page_keeps_its_files_to_itself(monkeypatch, tmp_path, page, image_file):
    """Gradio deletes what a page has written when it ends, and names files by their content."""
    page.pipeline.save_pretrained(tmp_path / "flow")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shared"))
    served, launch = [], page_module.launch

    def serve_a_request(blocks, **options):
        launch(blocks, prevent_thread_lock=True, quiet=True, **options)
        client = Client(blocks.local_url, verbose=False)
        client.predict(handle_file(image_file), "read", api_name="/invert")
        served.extend(tmp_path.glob("temporary/flowback_hf_*/*/*.png"))
        client.close()
        blocks.close()

    monkeypatch.setattr("flowback_hf.page.launch", serve_a_request)
    module = load_script(SCRIPT)
    module.main(module.parse_args(command_line(model=tmp_path / "flow")))
    assert served and not (tmp_path / "shared").exists()
    assert not list(tmp_path.glob("temporary/flowback_hf_*"))
