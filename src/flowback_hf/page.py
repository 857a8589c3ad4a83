# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is also the page of a Space, which has no package flowback_hf. It therefore imports torch, diffusers,
# Pillow and Gradio only.
"""The web page of a flow: sample, classify, invert and edit images, and see where their likelihood comes from."""

import contextlib
import queue
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from diffusers import DiffusionPipeline


try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The page needs Gradio: pip install "flowback_hf[app]".') from error


SOLVERS = ("auto", "sequential", "jacobi")
NO_CLASS = -1
# What one request may ask for.
MAX_IMAGES = 16
MAX_PIXELS = 50_000_000
MAX_FILE_SIZE = "20mb"
MAX_WAITING = 32
# Heights on the page.
CANVAS_SIZE = 320
PICTURE_SIZE = 300
# Images of the flow: how many to offer as examples, and how many to learn a typical likelihood from.
NUM_EXAMPLES = 8
NUM_REFERENCES = 64
# Bayes' rule among all classes takes a forward pass for each, so that flows with more shortlist as many first.
NUM_COMPARED_CLASSES = 20

# Fonts of the device: the default theme loads fonts from Google.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Images of a flow are small: show pixels as squares.
CSS = """
img {image-rendering: pixelated}
.picture img {width: 100%; height: 100%; object-fit: contain}
"""


@contextlib.contextmanager
def errors_on_the_page() -> Iterator[None]:
    """Show what the user can put right as a message on the page. Other errors are bugs, for the terminal."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def read_image(upload: dict[str, Any] | None) -> PIL.Image.Image:
    """
    Read an uploaded image, and say on the page what is not taken from it.

    Args:
        upload (`dict`, *optional*):
            What Gradio knows of the file, such as its `"path"`. Events that take it have `preprocess=False`: Gradio
            would read the image itself, with errors of its own.
    Returns:
        `PIL.Image.Image`: the image, or the first one of an animation.
    Raises:
        ValueError: if there is no file, or it is no image, damaged or too large.
    """
    if upload is None:
        raise ValueError("There is no image yet: upload one or choose an example.")
    try:
        with PIL.Image.open(upload["path"]) as image:  # reads the size only
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"it has {image.width}x{image.height} pixels, more than {MAX_PIXELS / 1e6:.0f} million"
                )
            if getattr(image, "n_frames", 1) > 1:
                gr.Info(f"Only the first of the {image.n_frames} images of this animation is used.")
            image.load()
            return image.copy()  # without the file's name, which error messages would show
    except PIL.UnidentifiedImageError:
        raise ValueError("The file cannot be read: it is not an image.") from None
    except Exception as error:  # Pillow's readers raise errors of any kind
        raise ValueError(f"The image cannot be read: {error}.") from error


class FlowPage:
    """
    The page of one flow.

    Args:
        pipeline ([`FlowBackPipeline`]): Draws and edits images.
        classifier ([`FlowBackClassificationPipeline`]): Classifies them, with the same flow.
        title (`str`): The headline.
    """

    def __init__(self, pipeline: DiffusionPipeline, classifier: DiffusionPipeline, title: str):
        self.pipeline = pipeline
        self.classifier = classifier
        self.title = title
        for each in (pipeline, classifier):
            each.set_progress_bar_config(disable=True)
        pipeline.transformer.requires_grad_(False)
        self.num_classes = pipeline.transformer.config.num_classes
        id2label = {int(label_id): name for label_id, name in (pipeline.config.id2label or {}).items()}
        self.classes = [(id2label.get(k, str(k)), k) for k in range(self.num_classes or 0)]
        self._folder = tempfile.TemporaryDirectory()
        self.examples = self._draw_examples()
        # Typical images are those that the flow draws without guidance.
        typical = self._draw(NUM_REFERENCES, guidance_scale=1.0, output_type="pt")
        self.reference_log_prob = classifier.log_prob(typical)
        corners = typical[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
        self.draws_light_on_dark = bool(corners.mean() < 0.5)

    def _draw(self, num_images: int, **options: Any) -> Any:
        """Draw images of all classes in turn, always the same."""
        generator = torch.Generator().manual_seed(0)
        return self.pipeline(**self._labels([], num_images), generator=generator, **options).images

    def _draw_examples(self) -> list[str]:
        images = self._draw(NUM_EXAMPLES)
        paths = [str(Path(self._folder.name, f"example_{number}.png")) for number in range(len(images))]
        for image, path in zip(images, paths):
            image.save(path)
        return paths

    def _labels(self, class_labels: list[int], num_images: int) -> dict[str, Any]:
        """Return the arguments of the pipeline that ask for images of these classes, or of all classes, in turn."""
        if self.num_classes is None:
            return {"num_images_per_prompt": num_images}
        class_labels = class_labels or range(self.num_classes)
        return {"class_labels": [class_labels[number % len(class_labels)] for number in range(num_images)]}

    # What the buttons do

    def sample(
        self,
        class_labels: list[int],
        guidance_scale: float,
        seed: int,
        num_images: int,
        solver: str,
        progress: gr.Progress = gr.Progress(),
    ) -> Iterator[list[PIL.Image.Image]]:
        """Yield the images after each flow block, and then without the noise of training."""
        call = {
            **self._labels(class_labels, num_images),
            "guidance_scale": guidance_scale,
            "generator": torch.Generator().manual_seed(seed),
            "solver": solver,
            "on_overflow": "raise",
        }
        with errors_on_the_page():
            for step, num_steps, images in self._call_in_steps(**call):
                progress((step, num_steps), desc="Flow blocks", unit="blocks")
                yield images

    def _call_in_steps(self, **call: Any) -> Iterator[tuple[int, int, list[PIL.Image.Image]]]:
        """Call the pipeline in a thread of its own, which ends early if nobody waits for the images any more."""
        steps, abandoned = queue.SimpleQueue(), threading.Event()

        def report(pipeline: DiffusionPipeline, step: int, block: int, tensors: dict[str, torch.Tensor]):
            pipeline._interrupt = abandoned.is_set()
            steps.put((step + 1, pipeline.num_timesteps, pipeline.decode(tensors["latents"])))

        with ThreadPoolExecutor(max_workers=1) as executor:
            future = executor.submit(self.pipeline, **call, callback_on_step_end=report)
            future.add_done_callback(lambda _: steps.put(None))
            try:
                for step, num_steps, images in iter(steps.get, None):
                    yield step, num_steps, images
            finally:
                abandoned.set()
            yield num_steps, num_steps, future.result().images

    def classify(self, upload: dict[str, Any] | None) -> tuple[dict[str, float] | None, str, PIL.Image.Image]:
        """Return p(class) for an uploaded image, how likely and how typical it is, and what the flow sees of it."""
        with errors_on_the_page():
            return self._classify(self._read(upload))

    def classify_drawing(self, drawing: dict[str, Any] | None) -> tuple[dict[str, float] | None, str, PIL.Image.Image]:
        """Do the same for a drawing."""
        with errors_on_the_page():
            composite = None if drawing is None else drawing["composite"]
            if composite is None or all(low == high for low, high in composite.getextrema()):
                raise ValueError("The canvas is empty: draw something first.")
            is_negative = self.pipeline.num_channels == 1 and self.draws_light_on_dark
            return self._classify(PIL.ImageOps.invert(composite) if is_negative else composite)

    def _classify(self, image: PIL.Image.Image) -> tuple[dict[str, float] | None, str, PIL.Image.Image]:
        scores = None
        if self.num_classes is not None:
            classes = self.classifier(image, top_k=5, shortlist_size=NUM_COMPARED_CLASSES)
            scores = {entry["label"]: entry["score"] for entry in classes}
        (log_prob,) = self.classifier.log_prob(image).tolist()
        (distance,) = self.classifier.out_of_distribution_score(image, self.reference_log_prob).tolist()
        verdict = "typical" if distance < 2 else "unusual" if distance < 4 else "nothing like what the flow draws"
        facts = (
            f"**log p(image) = {log_prob:.1f} nats**, {log_prob / self._num_values:.2f} for each of {self._num_values}"
            f" values. Images that the flow draws have {self.reference_log_prob.mean():.1f} ±"
            f" {self.reference_log_prob.std():.1f}. This one is {distance:.1f} standard deviations away:"
            f" **{verdict}**."
        )
        return scores, facts, self._as_seen(image)

    @property
    def _num_values(self) -> int:
        config = self.pipeline.transformer.config
        return config.in_channels * config.sample_size**2

    def _read(self, upload: dict[str, Any] | None) -> PIL.Image.Image:
        image, size = read_image(upload), self.pipeline.image_size
        if image.size != (size, size):
            gr.Info(
                f"The middle of the image, which has {image.width}x{image.height} pixels, is resized to {size}x{size}."
            )
        return image

    def _as_seen(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return an image as the flow gets it: of its size and channels, and through its VAE if it has one."""
        return self.pipeline.decode(self.pipeline.encode(image))[0]

    # How it looks

    def build(self) -> gr.Blocks:
        """Lay out the page."""
        with gr.Blocks(title=self.title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            gr.Markdown(f"# {self.title}")
            with gr.Tab("Sample"):
                self._build_sample()
            with gr.Tab("Classify"):
                self._build_classify()
        return blocks.queue(max_size=MAX_WAITING)

    def _build_sample(self):
        has_classes = self.num_classes is not None
        gr.Markdown("The flow turns noise into images, one flow block after another.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                class_labels = gr.Dropdown(
                    self.classes,
                    value=[],
                    multiselect=True,
                    label="Classes",
                    info="Leave this empty for all classes in turn.",
                    visible=has_classes,
                )
                guidance_scale = gr.Slider(
                    1,
                    10,
                    value=self.pipeline.config.guidance_scale,
                    step=0.1,
                    label="Guidance scale",
                    info="More guidance makes classes more distinct and images less varied. 1 is off.",
                    visible=has_classes,
                )
                num_images = gr.Slider(1, MAX_IMAGES, value=8, step=1, precision=0, label="Images")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=100)
                    solver = gr.Dropdown(SOLVERS, value="auto", label="Solver", min_width=100)
                button = gr.Button("Sample", variant="primary")
            with gr.Column(scale=2, min_width=300):
                images = gr.Gallery(
                    show_label=False, columns=4, object_fit="contain", format="png", elem_classes="picture"
                )
        options = [class_labels, guidance_scale, seed, num_images, solver]
        some_class = [self.classes[len(self.classes) // 2][1]] if has_classes else []
        gr.Examples(
            [[[], self.pipeline.config.guidance_scale, 0, 8, "auto"], [some_class, 1.0, 1, 4, "jacobi"]],
            options,
            cache_examples=False,
        )
        self._on_click(button, self.sample, options, images)

    def _build_classify(self):
        gr.Markdown("The flow knows how likely an image is in each class, and overall.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Tab("Upload"):
                    picture, upload_button = self._picture(), gr.Button("Classify the image", variant="primary")
                    self._examples(picture)
                with gr.Tab("Draw"):
                    drawing = gr.Sketchpad(
                        type="pil",
                        image_mode="RGB",
                        label="Drawing",
                        canvas_size=(CANVAS_SIZE, CANVAS_SIZE),
                        fixed_canvas=True,
                        layers=False,
                        transforms=(),
                        brush=gr.Brush(CANVAS_SIZE // 10, ["#000000", "#e63946", "#2a9d8f", "#457bd9", "#f4c430"]),
                    )
                    drawing_button = gr.Button("Classify the drawing", variant="primary")
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    scores = gr.Label(label="p(class)", visible=self.num_classes is not None)
                    seen = self._result("What the flow sees")
                facts = gr.Markdown()
        self._on_click(upload_button, self.classify, picture, [scores, facts, seen], preprocess=False)
        self._on_click(drawing_button, self.classify_drawing, drawing, [scores, facts, seen])

    def _picture(self, label: str = "Image") -> gr.Image:
        return gr.Image(label=label, sources=["upload", "clipboard"], elem_classes="picture", height=PICTURE_SIZE)

    def _result(self, label: str) -> gr.Image:
        return gr.Image(label=label, format="png", elem_classes="picture", height=PICTURE_SIZE)

    def _examples(self, *pictures: gr.Image):
        """Offer the examples for an image, or pairs of them for two."""
        pairs = [self.examples[number:] + self.examples[:number] for number in range(len(pictures))]
        gr.Examples([list(row) for row in zip(*pairs)], list(pictures), cache_examples=False)

    def _on_click(self, button: gr.Button, function: Any, inputs: Any, outputs: Any, **options: Any):
        """Let a button call a function. All of them share the processor: the queue runs them two at a time."""
        button.click(
            function,
            inputs,
            outputs,
            api_name=function.__name__,
            concurrency_limit=2,
            concurrency_id="flow",
            **options,
        )


def launch(page: FlowPage, **options: Any):
    """Serve a page until it is interrupted. The options are those of `gradio.Blocks.launch`."""
    page.build().launch(theme=THEME, css=CSS, max_file_size=MAX_FILE_SIZE, show_error=False, **options)
