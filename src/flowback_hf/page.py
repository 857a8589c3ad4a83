# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is also the page of a Space, which has no package flowback_hf. It therefore imports torch, diffusers,
# Pillow and Gradio only.
"""The web page of a flow: sample, classify, invert and edit images, and see where their likelihood comes from."""

import contextlib
import html
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
READ = "read"
MAX_SEED = 2**32 - 1
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
# Results of one request for an image.
NUM_VARIATIONS = 8
NUM_FRAMES = 11
# Bayes' rule among all classes takes a forward pass for each, so that flows with more shortlist as many first.
NUM_COMPARED_CLASSES = 20

# Fonts of the device: the default theme loads fonts from Google.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Images of a flow are small: show pixels as squares.
CSS = """
img {image-rendering: pixelated}
.picture img {width: 100%; height: 100%; object-fit: contain}
.labelled img {box-sizing: border-box; padding-top: 30px}
/* On a phone, too, all tabs and all columns fit. */
@media (max-width: 600px) {.tab-container button {padding: 0 8px}}
.picture .grid-container {
    grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
    grid-template-rows: none !important;
    grid-auto-rows: auto !important;
}
"""


@contextlib.contextmanager
def errors_on_the_page() -> Iterator[None]:
    """Show what the user can put right as a message on the page. Other errors are bugs, for the terminal."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def read_image(upload: dict[str, Any] | None, name: str = "image") -> PIL.Image.Image:
    """
    Read an uploaded image, and say on the page what is not taken from it.

    Args:
        upload (`dict`, *optional*):
            What Gradio knows of the file, such as its `"path"`. Events that take it have `preprocess=False`: Gradio
            would read the image itself, with errors of its own.
        name (`str`, defaults to `"image"`): What to call it in a message.
    Returns:
        `PIL.Image.Image`: the image, or the first one of an animation.
    Raises:
        ValueError: if there is no file, or it is no image, damaged or too large.
    """
    if upload is None:
        raise ValueError(f"There is no {name} yet: upload one or choose an example.")
    try:
        with PIL.Image.open(upload["path"]) as image:  # reads the size only
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"it has {image.width}x{image.height} pixels, more than {MAX_PIXELS / 1e6:.0f} million"
                )
            if getattr(image, "n_frames", 1) > 1:
                gr.Info(f"Only the first of the {image.n_frames} images of this animation is used.")
            image.load()
            if image.has_transparency_data:
                gr.Info("The flow knows no transparency: transparent parts have the color that the file gives them.")
            return image.copy()  # without the file's name, which error messages would show
    except PIL.UnidentifiedImageError:
        raise ValueError("The file cannot be read: it is not an image.") from None
    except Exception as error:  # Pillow's readers raise errors of any kind
        raise ValueError(f"The image cannot be read: {error}.") from error


def make_generator(seed: int) -> torch.Generator:
    if not (isinstance(seed, int) and 0 <= seed <= MAX_SEED):
        raise ValueError(f"`seed` must be a whole number from 0 to {MAX_SEED}, but is {seed!r}.")
    return torch.Generator().manual_seed(seed)


def noise_picture(noise: torch.Tensor) -> PIL.Image.Image:
    """Show noise of shape `(channels, height, width)`: -3 is black, 3 is white. Of four channels, three are shown."""
    levels = ((noise[: 3 if len(noise) >= 3 else 1] + 3) * (255 / 6)).clamp(0, 255).to(torch.uint8)
    return PIL.Image.fromarray(levels.permute(1, 2, 0).squeeze(2).cpu().numpy())


def heat_picture(
    image: PIL.Image.Image, values: torch.Tensor, low: float, high: float, colors: tuple[str, str, str]
) -> PIL.Image.Image:
    """Lay the colors of values, from `low` to `high`, over an image. A value covers a square of the image."""
    levels = ((values - low) * (255 / max(high - low, 1e-6))).clamp(0, 255).to(torch.uint8)
    first, middle, last = colors
    colored = PIL.ImageOps.colorize(PIL.Image.fromarray(levels.cpu().numpy()), first, last, middle)
    return PIL.Image.blend(image.convert("RGB"), colored.resize(image.size, PIL.Image.Resampling.NEAREST), 0.7)


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
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        for each in (pipeline, classifier):
            each.set_progress_bar_config(disable=True)
        pipeline.transformer.requires_grad_(False)
        self.solvers = SOLVERS if pipeline.reverse_transformer is None else (*SOLVERS, "learned")
        self.num_classes = pipeline.transformer.config.num_classes
        id2label = {int(label_id): name for label_id, name in (pipeline.config.id2label or {}).items()}
        self.classes = [(id2label.get(k, str(k)), k) for k in range(self.num_classes or 0)]
        self._folder = tempfile.TemporaryDirectory()
        self.examples = self._draw_examples()
        # Typical images are those that the flow draws without guidance.
        typical = self._draw(NUM_REFERENCES, guidance_scale=1.0, output_type="pt")
        labels = self._labels([], NUM_REFERENCES).get("class_labels")
        # Now and then a flow draws an image that overflows.
        finite = typical.flatten(1).isfinite().all(dim=1)
        typical, labels = typical[finite], labels and torch.tensor(labels)[finite.cpu()].tolist()
        self.reference_log_prob = classifier.log_prob(typical)
        self.reference_map = pipeline.likelihood_map(typical, labels).mean(dim=0)
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
        with errors_on_the_page():
            call = {
                **self._labels(class_labels, num_images),
                "guidance_scale": guidance_scale,
                "generator": make_generator(seed),
                "solver": solver,
                "on_overflow": "raise",
            }
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
            images = future.result().images  # raises what the call has raised
            yield num_steps, num_steps, images

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
            scores = {}
            for rank, entry in enumerate(classes, start=1):
                name = entry["label"]
                scores[f"{name} ({rank})" if name in scores else name] = entry["score"]  # classes may share a name
        (log_prob,) = self.classifier.log_prob(image).tolist()
        (distance,) = self.classifier.out_of_distribution_score(image, self.reference_log_prob).tolist()
        verdict = "typical" if distance < 2 else "unusual" if distance < 4 else "nothing like what the flow draws"
        facts = (
            f"**log p(image) = {log_prob:.1f} nats**, with the noise of training. Images that the flow draws have"
            f" {self.reference_log_prob.mean():.1f} on average, with a standard deviation of"
            f" {self.reference_log_prob.std():.1f}. This one is {distance:.1f} standard deviations away:"
            f" **{verdict}**."
        )
        if distance >= 2 and scores is not None:
            facts += " Do not rely on p(class): it compares the classes of the flow, and none of them may fit."
        return scores, facts, self._as_seen(image)

    def invert(
        self, upload: dict[str, Any] | None, label: int | str
    ) -> tuple[PIL.Image.Image, PIL.Image.Image, PIL.Image.Image, str]:
        """Return an image as the flow sees it, the noise that it is made of, the image made of that, and the error."""
        with errors_on_the_page():
            image = self._read(upload)
            label, name = self._class_of(image, label)
            data, noise = self.pipeline.encode(image), self.pipeline.invert(image, label)
            options = {"guidance_scale": 1.0, "denoise": False, "output_type": "latent"}
            restored = self.pipeline(label, latents=noise, **options).images
            facts = (
                f"The image was read as {name}. Its noise has a mean of {noise.mean():.2f} and a standard deviation of"
                f" {noise.std():.2f}. The image made from it again differs by at most"
                f" **{(restored - data).abs().max():.1e}**, on a scale from -1 to 1."
            )
            return self._as_seen(image), noise_picture(noise[0]), self.pipeline.decode(restored)[0], facts

    def swap_class(self, upload: dict[str, Any] | None, label: int | str, target: int) -> list[PIL.Image.Image]:
        """Return an image as the flow sees it, and a similar one of another class."""
        with errors_on_the_page():
            image = self._read(upload)
            label, _ = self._class_of(image, label)
            swapped = self.pipeline.swap_class(image, label, target, on_overflow="raise").images
            return [self._as_seen(image), *swapped]

    def vary(
        self, upload: dict[str, Any] | None, label: int | str, strength: float, seed: int
    ) -> list[PIL.Image.Image]:
        """Return variations of an image."""
        with errors_on_the_page():
            image = self._read(upload)
            label, _ = self._class_of(image, label)
            options = {
                "num_images_per_prompt": NUM_VARIATIONS,
                "generator": make_generator(seed),
                "on_overflow": "raise",
            }
            return self.pipeline.vary(image, strength, label, **options).images

    def interpolate(
        self, upload: dict[str, Any] | None, label: int | str, other: dict[str, Any] | None
    ) -> tuple[list[PIL.Image.Image], list[PIL.Image.Image]]:
        """Return the images between two images: to show, and for the slider."""
        with errors_on_the_page():
            images = [self._read(upload), self._read(other, "other image")]
            labels = [self._class_of(images[0], label)[0], self._class_of(images[1], READ)[0]]
            options = {"class_labels": None if self.num_classes is None else labels, "on_overflow": "raise"}
            images = self.pipeline.interpolate(*images, NUM_FRAMES, **options).images
            return images, images

    def show_frame(self, images: list[PIL.Image.Image], position: float) -> PIL.Image.Image | None:
        """Return the image at a position from 0 to 1, if there are images yet."""
        return images[round(position * (len(images) - 1))] if images else None

    def likelihood_map(
        self, upload: dict[str, Any] | None, label: int | str
    ) -> tuple[PIL.Image.Image, PIL.Image.Image, str]:
        """Return maps of how likely each part of an image is, by itself and compared with typical images."""
        with errors_on_the_page():
            image = self._read(upload)
            label, name = self._class_of(image, label)
            (nats,) = self.pipeline.likelihood_map(image, label)
            difference, seen = nats - self.reference_map, self._as_seen(image)
            reach = difference.abs().max()
            facts = (
                f"The image was read as {name}. The {nats.numel()} tokens have from {nats.min():.1f} to"
                f" {nats.max():.1f} nats, which sum to **log p(image | class) = {nats.sum():.1f} nats**, without the"
                f" noise of training. At most {reach:.1f} nats separate a token from the mean of typical images there."
            )
            maps = (
                heat_picture(seen, nats, nats.min(), nats.max(), ("#440154", "#21908c", "#fde725")),
                heat_picture(seen, difference, -reach, reach, ("#b2182b", "#f7f7f7", "#2166ac")),
            )
            return *maps, facts

    def _read(self, upload: dict[str, Any] | None, name: str = "image") -> PIL.Image.Image:
        image, size = read_image(upload, name), self.pipeline.image_size
        if image.size != (size, size):
            part = "image" if image.width == image.height else "middle of the image"
            gr.Info(f"The {part}, which has {image.width}x{image.height} pixels, is resized to {size}x{size}.")
        return image

    def _class_of(self, image: PIL.Image.Image, label: int | str) -> tuple[int | None, str]:
        """Return the class that the user chose, or else the likeliest one, and what to call it in Markdown."""
        if self.num_classes is None:
            return None, "an image without a class"
        if label == READ:
            scores = self.classifier.class_scores(image, shortlist_size=NUM_COMPARED_CLASSES)
            label = scores.argmax().item()
        name = next((f"class {name}" for name, known in self.classes if known == label), "an image of no class")
        return label, html.escape(name)

    def _as_seen(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return an image as the flow gets it: of its size and channels, and through its VAE if it has one."""
        return self.pipeline.decode(self.pipeline.encode(image))[0]

    # How it looks

    def build(self) -> gr.Blocks:
        """Lay out the page."""
        with gr.Blocks(title=self.title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            gr.Markdown(f"## {html.escape(self.title)}")
            with gr.Tab("Sample"):
                self._build_sample()
            with gr.Tab("Classify"):
                self._build_classify()
            with gr.Tab("Edit"):
                self._build_edit()
            with gr.Tab("Likelihood"):
                self._build_map()
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
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=100)
                    solver = gr.Dropdown(self.solvers, value="auto", label="Solver", min_width=100)
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
                        # An image to draw on: without one, nothing can be drawn before the brush is chosen.
                        PIL.Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), "white"),
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

    def _build_edit(self):
        has_classes = self.num_classes is not None
        gr.Markdown(
            "The flow turns an image into noise and back without loss. An edit changes the noise, or"
            " turns it back with another class."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                picture, label = self._picture(), self._label()
                self._examples(picture)
            with gr.Column(scale=2, min_width=300):
                with gr.Tab("Invert"):
                    button = gr.Button("Invert", variant="primary")
                    with gr.Row():
                        results = [
                            self._result(name) for name in ("What the flow sees", "Its noise", "Made from the noise")
                        ]
                    facts = gr.Markdown()
                    self._on_click(button, self.invert, [picture, label], [*results, facts], preprocess=False)
                with gr.Tab("Swap class", visible=has_classes):
                    target = gr.Dropdown(self.classes, value=0 if has_classes else None, label="Class to turn it into")
                    button = gr.Button("Swap the class", variant="primary")
                    with gr.Row():
                        results = [self._result(name) for name in ("What the flow sees", "As the other class")]
                    self._on_click(button, self.swap_class, [picture, label, target], results, preprocess=False)
                with gr.Tab("Vary"):
                    with gr.Row():
                        strength = gr.Slider(
                            0, 1, value=0.5, step=0.05, label="Strength", info="0 keeps the image, 1 draws a new one."
                        )
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                    button = gr.Button("Vary", variant="primary")
                    results = gr.Gallery(show_label=False, columns=4, format="png", elem_classes="picture")
                    self._on_click(button, self.vary, [picture, label, strength, seed], results, preprocess=False)
                with gr.Tab("Interpolate"):
                    with gr.Row():
                        with gr.Column(min_width=250):
                            other = self._picture("Other image")
                            button = gr.Button("Interpolate", variant="primary")
                            self._examples(other)
                        with gr.Column(min_width=250):
                            between = self._result("Between")
                            position = gr.Slider(0, 1, value=0.5, step=1 / (NUM_FRAMES - 1), label="Position")
                    row = gr.Gallery(show_label=False, columns=6, format="png", elem_classes="picture")
                    frames = gr.State([])
                    done = self._on_click(
                        button, self.interpolate, [picture, label, other], [row, frames], preprocess=False
                    )
                    show = {"fn": self.show_frame, "inputs": [frames, position], "outputs": between}
                    done.success(**show, api_visibility="private")
                    position.input(**show, api_visibility="private", show_progress="hidden")

    def _build_map(self):
        gr.Markdown(
            "The flow divides an image into squares, its tokens, and each adds to the log-likelihood. In the first"
            " map, yellow tokens add more than violet ones. In the second, blue tokens add more than the same tokens"
            " of typical images do, and red ones add less. The image shines through."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                picture, label = self._picture(), self._label()
                button = gr.Button("Map the likelihood", variant="primary")
                self._examples(picture)
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    maps = [
                        self._result("Likelihood"),
                        self._result("Against typical images"),
                    ]
                facts = gr.Markdown()
        self._on_click(button, self.likelihood_map, [picture, label], [*maps, facts], preprocess=False)

    def _picture(self, label: str = "Image") -> gr.Image:
        return gr.Image(
            label=label,
            sources=["upload", "clipboard"],
            elem_classes=["picture", "labelled"],
            height=PICTURE_SIZE,
        )

    def _label(self) -> gr.Dropdown:
        choices = [("recognized by the flow", READ), ("none", NO_CLASS), *self.classes]
        return gr.Dropdown(choices, value=READ, label="Class of the image", visible=self.num_classes is not None)

    def _result(self, label: str) -> gr.Image:
        return gr.Image(
            label=label,
            format="png",
            buttons=["download", "fullscreen"],
            elem_classes=["picture", "labelled"],
            height=PICTURE_SIZE,
        )

    def _examples(self, *pictures: gr.Image):
        """Offer the examples for an image, or pairs of them for two."""
        pairs = [self.examples[number:] + self.examples[:number] for number in range(len(pictures))]
        gr.Examples([list(row) for row in zip(*pairs)], list(pictures), cache_examples=False)

    def _on_click(self, button: gr.Button, function: Any, inputs: Any, outputs: Any, **options: Any) -> Any:
        """Let a button call a function. All of them share the processor: the queue runs them two at a time."""
        return button.click(
            function,
            inputs,
            outputs,
            api_name=function.__name__,
            concurrency_limit=2,
            concurrency_id="flow",
            **options,
        )


def launch(blocks: gr.Blocks, **options: Any):
    """Serve a page. The options are those of `gradio.Blocks.launch`."""
    blocks.launch(
        theme=THEME, css=CSS, max_file_size=MAX_FILE_SIZE, footer_links=["api", "gradio", "settings"], **options
    )
