"""
What editing images through a flow's latents achieves, by an independent judge: swaps of the class, variations,
interpolations, and likelihood maps. Each is measured beside its alternatives on the validation images of a demo data
set, and `--pictures` draws one picture of each.

    python benchmarks/editing.py --model outputs/quickstart/flow --data_dir outputs/quickstart/digits \\
        --output benchmarks/results/editing_digits.json --pictures docs/images
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from classification_accuracy import list_images
from reporting import add_run_arguments, write_report
from tqdm.auto import tqdm

from flowback_hf import FlowBackPipeline
from flowback_hf.evaluation.samples import label_reader
from flowback_hf.files import read_json
from flowback_hf.metrics import load_feature_extractor
from flowback_hf.models.transformer_tarflow import Guidance
from flowback_hf.pipelines.pipeline_flowback import slerp
from flowback_hf.reporting import figure_file, markdown_table
from flowback_hf_cli.numbers import COUNT, SEED, Number


STRENGTHS = [0.25, 0.5, 0.75, 1.0]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="A saved pipeline.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Output folder of training/prepare_demo.py.")
    parser.add_argument(
        "--judge", type=Path, help="An image classifier of transformers. Default: the folder judge of --data_dir."
    )
    parser.add_argument(
        "--num_images", type=COUNT, default=300, help="Validation images, at most. Default: %(default)s."
    )
    parser.add_argument(
        "--num_pairs", type=COUNT, default=100, help="Pairs of images to interpolate between. Default: %(default)s."
    )
    parser.add_argument(
        "--num_steps", type=Number(int, at_least=2), default=11, help="Images from end to end. Default: %(default)s."
    )
    parser.add_argument(
        "--patch_tokens",
        type=COUNT,
        default=2,
        help="Height and width, in tokens, of the patch that is pasted from another image. Default: %(default)s.",
    )
    parser.add_argument(
        "--seeds", type=SEED, nargs="+", default=[0, 1, 2], help="Seeds, one measurement each. Default: 0 1 2."
    )
    parser.add_argument("--pictures", type=Path, help="A folder for the pictures. Default: none are drawn.")
    add_run_arguments(parser, "editing.json", device=False)
    return parser.parse_args(arguments)


class Judged(NamedTuple):
    """What the judge sees in images: features, `(num_images, feature_dim)`, class ids and their probabilities."""

    features: torch.Tensor
    label_ids: torch.Tensor
    confidence: torch.Tensor


class Bench:
    """A pipeline, images that it was not trained on, and a judge."""

    def __init__(self, args: argparse.Namespace):
        self.pipe = FlowBackPipeline.from_pretrained(args.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer.requires_grad_(False)
        self.extractor = load_feature_extractor(str(args.judge or args.data_dir / "judge"))
        config = self.transformer.config
        if args.patch_tokens >= config.sample_size // config.patch_size:
            raise ValueError(
                f"`--patch_tokens` must be less than {config.sample_size // config.patch_size}, the height and width"
                f" of an image in tokens, but is {args.patch_tokens}."
            )
        read_as = label_reader(self.extractor, self.pipe)
        if read_as is None:
            raise ValueError(f"`--judge` must know the classes of the flow, {list(self.pipe.labels)}.")
        self.read_as = torch.from_numpy(read_as)
        files, names = list_images(args.data_dir / "images" / "validation", args.num_images)
        self.labels = torch.tensor([self.pipe.labels[name] for name in names])
        self.sample = self.pipe.encode(files)
        self.pixels = self.to_pixels(self.sample)
        self.judged = self.judge(self.sample)

    def to_pixels(self, sample: torch.Tensor) -> torch.Tensor:
        return self.pipe.decode(sample, "pt")

    def judge(self, sample: torch.Tensor) -> Judged:
        output = self.extractor(self.pipe.decode(sample, "pil"))
        confidence, label_ids = output.logits.softmax(dim=1).max(dim=1)
        return Judged(output.features, self.read_as[label_ids], confidence)

    def invert(self, noise: torch.Tensor | None = None, guidance_scale: float = 1.0) -> torch.Tensor:
        """The latents of all images under their classes, optionally with noise of training or with guidance."""
        sample = self.sample if noise is None else self.sample + self.transformer.config.noise_std * noise
        tokens = self.transformer.patchify(sample)
        for block in self.transformer.blocks:
            tokens = block(tokens, self.labels, guidance=Guidance(guidance_scale)).tokens
        return self.transformer.unpatchify(tokens)

    def generate(self, latents: torch.Tensor, class_labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """Data from latents, neither clipped nor decoded."""
        return self.pipe(class_labels, latents=latents, output_type="latent", **options).images

    def compare(self, sample: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each image that was made from one of the validation images: how it is read, and how far it is away."""
        judged = self.judge(sample)
        return {
            "read_as_wanted": (judged.label_ids == wanted).double(),
            "pixel_distance": (self.to_pixels(sample) - self.pixels).square().flatten(1).mean(dim=1).sqrt(),
            "feature_distance": (judged.features - self.judged.features).norm(dim=1),
        }


def figure(values: Iterable[torch.Tensor]) -> dict[str, float]:
    """Mean and standard error of the mean."""
    values = torch.cat([each.flatten().double() for each in values])
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": values.mean().item(), "standard_error": error}


def summarise(measured: dict[str, list[dict[str, torch.Tensor]]]) -> list[dict[str, Any]]:
    """A row for each name, with a figure over the images of all seeds for each quantity."""
    return [
        {"method": name, **{key: figure(each[key] for each in of_seeds) for key in of_seeds[0]}}
        for name, of_seeds in measured.items()
    ]


# Swaps and variations


def measure_swaps(bench: Bench, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Turn every image into another class, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = bench.transformer.config.num_classes
    shifts = torch.randint(1, num_classes, bench.labels.shape, generator=generator)
    target = (bench.labels + shifts) % num_classes
    noise = bench.pipe.prepare_latents(len(target), generator)
    scale = bench.pipe.config.guidance_scale
    latents, noisy_latents = bench.invert(), bench.invert(noise)
    made = {
        "swap_class": bench.generate(latents, target, denoise=False),
        "swap_class, denoised": bench.generate(latents, target),
        "swap_class, noise added first": bench.generate(noisy_latents, target),
        "swap_class, guided inversion": bench.generate(bench.invert(guidance_scale=scale), target, denoise=False),
        "swap_class, no guidance": bench.generate(latents, target, guidance_scale=1.0, denoise=False),
        "new sample": bench.generate(bench.pipe.prepare_latents(len(target), generator), target),
    }
    return {name: bench.compare(sample, target) for name, sample in made.items()}


def measure_variations(bench: Bench, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Draw a part of every latent anew, or the latents of some tokens."""
    generator = torch.Generator().manual_seed(seed)
    noise, training_noise = (bench.pipe.prepare_latents(len(bench.labels), generator) for _ in range(2))
    latents, noisy_latents = bench.invert(), bench.invert(training_noise)
    tokens, noise_tokens = bench.transformer.patchify(latents), bench.transformer.patchify(noise)
    chances = torch.rand(tokens.shape[:2], generator=generator).unsqueeze(2)
    plain, measured = {"guidance_scale": 1.0, "denoise": False}, {}
    for strength in STRENGTHS:
        kept = math.sqrt(1 - strength**2)
        some_tokens = bench.transformer.unpatchify(torch.where(chances < strength, noise_tokens, tokens))
        edits = {
            "vary": (kept * latents + strength * noise, plain),
            "vary, guided": (kept * latents + strength * noise, {"denoise": False}),
            "vary, noise added first": (kept * noisy_latents + strength * noise, {"guidance_scale": 1.0}),
            "all latents of some tokens": (some_tokens, plain),
        }
        for name, (edited, options) in edits.items():
            sample = bench.generate(edited, bench.labels, **options)
            measured[f"{name}, {strength:g}"] = bench.compare(sample, bench.labels)
    return measured


# Interpolation


def measure_interpolations(
    bench: Bench, num_pairs: int, num_steps: int, seed: int
) -> dict[str, dict[str, torch.Tensor]]:
    """How evenly the judge's features move, and how sure the judge is half-way."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randperm(len(bench.labels), generator=generator)[:2] for _ in range(num_pairs)]
    fractions = torch.linspace(0, 1, num_steps)
    noisy_latents = bench.invert(bench.pipe.prepare_latents(len(bench.labels), generator))
    class_weights = torch.eye(bench.transformer.config.num_classes)[bench.labels]

    def interpolate(first: int, last: int, **options: Any) -> torch.Tensor:
        images, classes = bench.pixels[[first, last]], bench.labels[[first, last]]
        return bench.pipe.interpolate(*images, num_steps, classes, output_type="latent", **options).images

    def interpolate_noisy(first: int, last: int) -> torch.Tensor:
        weights = torch.lerp(class_weights[first], class_weights[last], fractions.unsqueeze(1))
        latents = slerp(noisy_latents[first], noisy_latents[last], fractions)
        return bench.generate(latents, weights, guidance_scale=1.0)

    paths: dict[str, Callable[[int, int], torch.Tensor]] = {
        "pixels blended": lambda first, last: torch.stack(
            [torch.lerp(bench.sample[first], bench.sample[last], fraction) for fraction in fractions]
        ),
        "interpolate": interpolate,
        "interpolate, noise added first": interpolate_noisy,
        "interpolate, guided": lambda first, last: interpolate(
            first, last, guidance_scale=bench.pipe.config.guidance_scale
        ),
    }
    measured = {}
    for name, path in paths.items():
        judged = [bench.judge(path(*pair.tolist())) for pair in pairs]
        steps = torch.stack([each.features.diff(dim=0).norm(dim=1) for each in judged])  # (num_pairs, num_steps - 1)
        middle = slice(num_steps // 3, num_steps - num_steps // 3)
        measured[name] = {
            "largest_over_mean_step": steps.amax(dim=1) / steps.mean(dim=1),
            "confidence_in_the_middle": torch.stack([each.confidence[middle].mean() for each in judged]),
        }
    return measured


# Likelihood maps


class Pasted(NamedTuple):
    """Images with a patch of another image, and where it is: `(num_images, grid_size, grid_size)`."""

    images: torch.Tensor
    is_pasted: torch.Tensor


def paste_patches(bench: Bench, patch_tokens: int, seed: int) -> Pasted:
    """Paste a patch of another image into every image. Both places are drawn at random, on the grid of tokens."""
    generator = torch.Generator().manual_seed(seed)
    config = bench.transformer.config
    grid_size = config.sample_size // config.patch_size
    cell = config.patch_size * bench.pipe.vae_scale_factor

    def draw(bound: int, number: int) -> list[int]:
        return torch.randint(bound, (number,), generator=generator).tolist()

    def patch(row: int, column: int, unit: int) -> tuple[slice, slice]:
        return tuple(slice(unit * start, unit * (start + patch_tokens)) for start in (row, column))

    images = bench.pixels.clone()
    is_pasted = torch.zeros(len(images), grid_size, grid_size, dtype=torch.bool)
    for number in range(len(images)):
        (shift,), place = draw(len(images) - 1, 1), draw(grid_size - patch_tokens + 1, 4)
        other = bench.pixels[(number + 1 + shift) % len(images)]
        images[(number, slice(None), *patch(*place[:2], cell))] = other[(slice(None), *patch(*place[2:], cell))]
        is_pasted[(number, *patch(*place[:2], 1))] = True
    return Pasted(images, is_pasted)


def measure_maps(bench: Bench, patch_tokens: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """How well a map finds the tokens of the patch: the area under the ROC curve, over the tokens of all images."""
    from sklearn.metrics import roc_auc_score

    pasted = paste_patches(bench, patch_tokens, seed)
    typical = bench.pipe.likelihood_map(bench.pixels, bench.labels).mean(dim=0)
    given_class = bench.pipe.likelihood_map(pasted.images, bench.labels)
    generator = torch.Generator().manual_seed(seed)
    cell = bench.transformer.config.patch_size * bench.pipe.vae_scale_factor
    patches = torch.nn.functional.unfold(pasted.images, cell, stride=cell)
    scores = {
        "likelihood_map": -given_class,
        "likelihood_map, less the mean at each place": typical - given_class,
        "likelihood_map, noise added first": -bench.pipe.likelihood_map(
            pasted.images, bench.labels, add_noise=True, generator=generator
        ),
        "likelihood_map, no class": -bench.pipe.likelihood_map(pasted.images),
        "variance of the patch": patches.var(dim=1),
    }
    wanted = pasted.is_pasted.flatten()
    return {
        name: {"auroc": torch.tensor(roc_auc_score(wanted, score.detach().flatten()))}
        for name, score in scores.items()
    }


# Pictures


def draw_grid(path: Path, rows: list[list[torch.Tensor]], titles: list[str], names: Iterable[str] = ()):
    """Draw rows of images, of shape `(channels, height, width)`, and of maps, `(height, width)`, on one scale."""
    values = torch.cat([torch.zeros(0), *(image.flatten() for row in rows for image in row if image.ndim == 2)])
    scale = {} if len(values) == 0 else {"vmin": values.quantile(0.01).item(), "vmax": values.max().item()}
    num_columns = max(map(len, rows))
    size = (0.85 * num_columns + 0.7, 0.85 * len(rows) + 0.3)
    with figure_file(path, len(rows), num_columns, figsize=size, dpi=72) as (figure, axes):
        for axis in axes.flat:
            axis.axis("off")
        for row, images in enumerate(rows):
            for axis, image in zip(axes[row], images):
                if image.ndim == 2:
                    axis.imshow(image, cmap="magma", **scale)
                else:
                    image = image.clamp(0, 1)
                    image = image[0] if len(image) == 1 else image.movedim(0, -1)
                    axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        for axis, title in zip(axes[0], titles):
            axis.set_title(title, fontsize=9)
        for axis, name in zip(axes[:, 0], names):
            axis.text(-0.15, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
        figure.tight_layout(pad=0.3)


def draw_pictures(bench: Bench, folder: Path, patch_tokens: int):
    """One picture for each method of the pipeline, all from the first image of some classes."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe, num_classes = bench.pipe, bench.transformer.config.num_classes
    names = [pipe.config.id2label[label] for label in range(num_classes)]
    first = [bench.labels.tolist().index(label) for label in range(num_classes)]
    images, classes = bench.pixels[first], bench.labels[first]
    shown = list(range(0, num_classes, max(1, num_classes // 4)))[:4]

    latents = pipe.invert(images, classes)
    restored = pipe(classes, latents=latents, guidance_scale=1.0, denoise=False, output_type="pt").images
    rows = [list(images), list(latents[:, 0]), list(restored)]
    draw_grid(folder / "editing_invert.png", rows, names, ["image", "latents", "restored"])

    rows = []
    for number in shown:
        swapped = pipe.swap_class([images[number]] * num_classes, classes[[number]], names, output_type="pt").images
        rows.append([images[number], *swapped])
    draw_grid(folder / "editing_swap.png", rows, ["image", *(f"to {name}" for name in names)])

    rows = [
        list(pipe.interpolate(images[number], images[other], 9, classes[[number, other]], output_type="pt").images)
        for number, other in zip(shown, [*shown[1:], shown[0]])
    ]
    draw_grid(folder / "editing_interpolate.png", rows, [f"{fraction:g}" for fraction in torch.linspace(0, 1, 9)])

    strengths = [0.0, *STRENGTHS]
    rows = []
    for number in shown:
        generator = torch.Generator().manual_seed(number)
        options = {"class_labels": classes[[number]], "generator": generator, "num_images_per_prompt": 2}
        varied = [pipe.vary(images[number], each, output_type="pt", **options).images for each in strengths]
        rows.append([image for pair in varied for image in pair][1:])
    titles = [f"{strength:g}" for strength in strengths for _ in range(2)][1:]
    draw_grid(folder / "editing_vary.png", rows, titles)

    pasted = paste_patches(bench, patch_tokens, seed=0)
    typical = pipe.likelihood_map(bench.pixels, bench.labels).mean(dim=0)
    maps = [pipe.likelihood_map(each[first], classes) - typical for each in (bench.pixels, pasted.images)]
    lit = torch.nn.functional.interpolate(pasted.is_pasted[first].unsqueeze(1).float(), images.shape[-2:])
    rows = [images, maps[0], pasted.images[first], pasted.images[first] * (0.2 + 0.8 * lit), maps[1]]
    titles = ["image", "its map", "with a patch", "the patch", "its map"]
    draw_grid(folder / "editing_map.png", [list(row) for row in rows], names, titles)


# The report


def percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * (value['standard_error'] or 0):.1f} %"


def number(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} ± {value['standard_error'] or 0:.2f}"


def make_tables(results: dict[str, Any]) -> str:
    quantities = {
        "read_as_wanted": ("read as wanted", percent),
        "pixel_distance": ("pixel distance", number),
        "feature_distance": ("feature distance", number),
        "largest_over_mean_step": ("largest / mean step", number),
        "confidence_in_the_middle": ("judge's confidence half-way", percent),
        "auroc": ("AUROC", number),
    }
    tables = []
    for name in ("swaps", "variations", "interpolations", "maps"):
        chosen = {key: quantities[key] for key in results[name][0] if key in quantities}
        rows = [[row["method"], *(write(row[key]) for key, (_, write) in chosen.items())] for row in results[name]]
        tables.append(markdown_table([name, *(title for title, _ in chosen.values())], rows))
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    demo = read_json(args.data_dir / "demo.json")
    if demo is None:
        raise ValueError(
            f"`--data_dir` must be an output folder of training/prepare_demo.py, but {args.data_dir} has no demo.json."
        )
    bench = Bench(args)
    measured = {"swaps": {}, "variations": {}, "interpolations": {}, "maps": {}}
    for seed in tqdm(args.seeds, desc="Seeds"):
        of_seed = {
            "swaps": measure_swaps(bench, seed),
            "variations": measure_variations(bench, seed),
            "interpolations": measure_interpolations(bench, args.num_pairs, args.num_steps, seed),
            "maps": measure_maps(bench, args.patch_tokens, seed),
        }
        for kind, methods in of_seed.items():
            for method, values in methods.items():
                measured[kind].setdefault(method, []).append(values)
    results = {
        "data": demo["kind"],
        "num_images": len(bench.labels),
        "seeds": args.seeds,
        "num_pairs": args.num_pairs,
        "guidance_scale": bench.pipe.config.guidance_scale,
        "judge_reads_images": figure([(bench.judged.label_ids == bench.labels).double()]),
        "latents_std": {
            "clean": bench.invert().std().item(),
            "noise added first": bench.invert(torch.randn(bench.sample.shape)).std().item(),
        },
        **{kind: summarise(methods) for kind, methods in measured.items()},
    }
    tables = make_tables(results)
    print(tables)
    write_report(args.output, arguments, "cpu", results, tables)
    if args.pictures is not None:  # after the report, which names a commit: pictures are files of the repository
        draw_pictures(bench, args.pictures, args.patch_tokens)


if __name__ == "__main__":
    main()
