"""
Images per second that come out of a data loader, from files, from prepared parquet files and from a stream.

    python benchmarks/loader.py

Images of 256x256 pixels become 64x64, as JPEG and as PNG. Every case is one pass over the same images, after a first
pass that starts the workers. Beside that, the microseconds of each part of an image's way, and what would change if
images stayed 8-bit integers until they are on the device.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from reporting import add_run_arguments, seconds_of, write_report
from tqdm.auto import tqdm

from flowback_hf.data import ImageDataset, Stream, collate
from flowback_hf.data.images import ImageReader, decode_image, image_to_tensor
from flowback_hf.data.streams import first_itineraries
from flowback_hf.pipelines.pipeline_flowback import fit_image
from flowback_hf.reporting import markdown_table


FORMATS = ("jpeg", "png")
SOURCES = ("files", "parquet", "streaming")
NUM_SHARDS = 4


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=384, help="Images in a pass. Default: %(default)s.")
    parser.add_argument("--size", type=int, default=256, help="Height and width of the files. Default: %(default)s.")
    parser.add_argument(
        "--sample_size", type=int, default=64, help="Height and width that they get. Default: %(default)s."
    )
    parser.add_argument("--batch_size", type=int, default=32, help="Images in a batch. Default: %(default)s.")
    parser.add_argument(
        "--num_workers", type=int, nargs="+", default=[0, 1, 2], help="Loader workers. Default: 0, 1 and 2."
    )
    add_run_arguments(parser, "loader.json", device=False, threads=False)
    return parser.parse_args(arguments)


def draw_images(number: int, size: int) -> list[PIL.Image.Image]:
    """Soft blobs with some noise: files of about the size that photographs have."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(number):
        blobs = PIL.Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        pixels = np.asarray(blobs.resize((size, size), PIL.Image.Resampling.BICUBIC)) + rng.normal(
            0, 8, (size, size, 3)
        )
        images.append(PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return images


def save_images(images: list[PIL.Image.Image], kind: str, folder: Path):
    """As files in a folder of one class, and the same bytes in parquet files."""
    (folder / "files" / "train" / "class").mkdir(parents=True)
    (folder / "parquet").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "files" / "train" / "class" / f"{number:05d}.{kind}", quality=90)
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(folder / "files"), split="train", cache_dir=str(folder / "cache")
    )
    for shard in range(NUM_SHARDS):
        rows.shard(NUM_SHARDS, shard).to_parquet(folder / "parquet" / f"{shard}.parquet")


def open_source(source: str, folder: Path, sample_size: int) -> torch.utils.data.Dataset:
    columns = ("image", None, [], sample_size, 3)
    if source == "files":
        builder = {"path": "imagefolder", "data_dir": str(folder / "files")}
    else:
        builder = {"path": "parquet", "data_dir": str(folder / "parquet")}
    if source == "streaming":
        rows = datasets.load_dataset(**builder, split="train", streaming=True)
        reader = ImageReader(*columns)
        return Stream(reader.prepare(rows), reader)
    return ImageDataset(datasets.load_dataset(**builder, split="train", cache_dir=str(folder / "cache")), *columns)


def images_per_second(dataset: torch.utils.data.Dataset, num_images: int, batch_size: int, num_workers: int) -> float:
    """Of a pass over as many images, by a loader that has done one before."""
    num_batches = num_images // batch_size
    is_stream = isinstance(dataset, Stream)
    if is_stream:
        dataset.itineraries = first_itineraries(max(1, num_workers))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        shuffle=None if is_stream else True,
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    pass_through(batches, num_batches)
    start = time.perf_counter()
    pass_through(batches, num_batches)
    return num_batches * batch_size / (time.perf_counter() - start)


def pass_through(batches: Any, number: int):
    for _ in itertools.islice(batches, number):
        pass


def microseconds_of_parts(rows: datasets.Dataset, sample_size: int, batch_size: int) -> dict[str, float]:
    """Of an image, in one process. `convert later` is what would take the place of `convert` and `collate`."""
    files = [row["image"] for row in rows.cast_column("image", datasets.Image(decode=False))]
    decoded = [decode_image(file, "RGB") for file in files]
    fitted = [fit_image(image, sample_size) for image in decoded]
    floats = [{"images": image_to_tensor(image), "class_labels": 0, "skipped": []} for image in fitted]
    eight_bit = [{"images": torch.from_numpy(np.array(image))} | rest(item) for image, item in zip(fitted, floats)]

    def in_batches(function: Callable, items: list) -> Callable[[], None]:
        return lambda: [function(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]

    def collate_and_convert(items: list):
        return collate(items)["images"].permute(0, 3, 1, 2) / 127.5 - 1

    parts = {
        "decode": lambda: [decode_image(file, "RGB") for file in files],
        "resize": lambda: [fit_image(image, sample_size) for image in decoded],
        "convert": lambda: [image_to_tensor(image) for image in fitted],
        "collate": in_batches(collate, floats),
        "convert later": in_batches(collate_and_convert, eight_bit),
    }
    return {name: 1e6 * min(seconds_of(part, "cpu") for _ in range(3)) / len(files) for name, part in parts.items()}


def rest(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "images"}


def main(args: argparse.Namespace, arguments: list[str] | None = None):
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    images = draw_images(args.num_images, args.size)
    speeds, parts, kilobytes = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            save_images(images, kind, Path(folder, kind))
            sizes = [file.stat().st_size for file in Path(folder, kind, "files").rglob(f"*.{kind}")]
            kilobytes[kind] = sum(sizes) / len(sizes) / 1000
        cases = list(itertools.product(FORMATS, SOURCES, args.num_workers))
        for kind, source, num_workers in tqdm(cases):
            dataset = open_source(source, Path(folder, kind), args.sample_size)
            speed = images_per_second(dataset, args.num_images, args.batch_size, num_workers)
            case = {"format": kind, "source": source, "num_workers": num_workers}
            speeds.append(case | {"images_per_second": speed})
        for kind in FORMATS:
            dataset = open_source("files", Path(folder, kind), args.sample_size)
            parts[kind] = microseconds_of_parts(dataset.rows, args.sample_size, args.batch_size)
    results = {"speeds": speeds, "microseconds": parts, "kilobytes": kilobytes}
    results |= {"size": args.size, "sample_size": args.sample_size, "batch_size": args.batch_size}
    table = render(results)
    print(table)
    write_report(args.output, arguments, "cpu", results, table)


def render(results: dict[str, Any]) -> str:
    first = {case["format"]: case["images_per_second"] for case in reversed(results["speeds"])}
    rows = [
        [case["format"], case["source"], str(case["num_workers"]), f"{case['images_per_second']:.0f}",
         f"{case['images_per_second'] / first[case['format']]:.2f}"]
        for case in results["speeds"]
    ]  # fmt: skip
    speeds = markdown_table(["format", "source", "workers", "images/s", "against the first"], rows)
    parts = [
        [kind, f"{results['kilobytes'][kind]:.0f}", *(f"{value:.0f}" for value in values.values())]
        for kind, values in results["microseconds"].items()
    ]
    names = [f"{name}, µs" for name in next(iter(results["microseconds"].values()))]
    return f"{speeds}\n\n{markdown_table(['format', 'kB', *names], parts)}"


if __name__ == "__main__":
    main(parse_args())
