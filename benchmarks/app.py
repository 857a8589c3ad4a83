#!/usr/bin/env python
# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Measures how quickly the page of pipelines/app.py starts and answers: every button, as one user presses it. With
`--screenshots`, a browser also takes the two pictures of docs/app.md.

    python benchmarks/app.py --model outputs/quickstart/flow
    python benchmarks/app.py --model outputs/quickstart/flow --screenshots docs/images
"""

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradio_client import Client, handle_file
from reporting import add_run_arguments, seconds_of, write_report
from tqdm.auto import tqdm

from flowback_hf import FlowBackClassificationPipeline, FlowBackPipeline
from flowback_hf.page import FlowPage
from flowback_hf.reporting import markdown_table


SCRIPT = Path(__file__).resolve().parents[1] / "pipelines" / "app.py"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="outputs/quickstart/flow", help="The folder of the flow. Default: %(default)s."
    )
    parser.add_argument("--repeats", type=int, default=20, help="Requests to time for a button. Default: %(default)s.")
    parser.add_argument(
        "--screenshots",
        type=Path,
        help="Write two pictures of the page to this folder, with Chromium. Default: take none.",
    )
    add_run_arguments(parser, "app.json", device=False, threads=False)
    return parser.parse_args(arguments)


@contextmanager
def serve(model: str) -> Iterator[tuple[str, float]]:
    """Serve a page in a process of its own. Yields its address and the seconds until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, SCRIPT, "--model", model, "--server_port", str(port)])
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None:
                    raise ValueError(f"`--model` {model!r} has no page: pipelines/app.py ended.") from None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/", time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


def requests(page: FlowPage) -> dict[str, tuple]:
    """What a user asks for with each button: the examples of the page, with its own settings."""
    image, other = (handle_file(path) for path in page.examples[:2])
    drawing = {"background": None, "layers": [], "composite": image}
    guidance_scale = page.pipeline.config.guidance_scale
    return {
        "/sample": ([], guidance_scale, 0, 8, "auto"),
        "/classify": (image,),
        "/classify_drawing": (drawing,),
        "/invert": (image, "read"),
        "/swap_class": (image, "read", 0),
        "/vary": (image, "read", 0.5, 0),
        "/interpolate": (image, "read", other),
        "/likelihood_map": (image, "read"),
    }


def measure(address: str, page: FlowPage, repeats: int) -> dict[str, dict[str, Any]]:
    client, seconds = Client(address, verbose=False), {}
    for name, arguments in tqdm(requests(page).items()):
        times = [seconds_of(lambda: client.predict(*arguments, api_name=name), "cpu") for _ in range(repeats + 1)]
        first, *later = times
        seconds[name] = {"first": first, "median": statistics.median(later), "longest": max(later)}
    return seconds


def take_screenshots(address: str, folder: Path):
    """A wide picture of classes swapped, and one of a likelihood map as on a phone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        wide = browser.new_page(viewport={"width": 1100, "height": 760})
        wide.goto(address)
        wide.get_by_role("tab", name="Edit", exact=True).click()
        wide.locator("img[src*=example_3]:visible").last.click()
        wide.get_by_role("tab", name="Swap class").click()
        wide.get_by_role("button", name="Swap the class").click()
        wide.locator(".block:visible", has_text="As the other class").last.locator("img").wait_for()
        wide.wait_for_timeout(1000)  # for the pictures to be drawn
        wide.screenshot(path=folder / "app_swap.png")
        phone = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=1)
        phone.goto(address)
        phone.get_by_role("button", name="Sample").click()
        phone.locator(".grid-container img").nth(7).wait_for()
        phone.wait_for_timeout(1000)
        phone.screenshot(path=folder / "app_phone.png")
        browser.close()


def main(args: argparse.Namespace, arguments: list[str] | None = None):
    pipeline = FlowBackPipeline.from_pretrained(args.model)
    classifier = FlowBackClassificationPipeline.from_pipe(pipeline)
    pages = []
    build = seconds_of(lambda: pages.append(FlowPage(pipeline, classifier, "page")) or pages[0].build(), "cpu")
    with serve(args.model) as (address, start):
        seconds = measure(address, pages[0], args.repeats)
        if args.screenshots is not None:
            take_screenshots(address, args.screenshots)
    header = ["button", "first request, s", "median, s", "longest, s"]
    rows = [[name.removeprefix("/"), *(f"{each:.2f}" for each in times.values())] for name, times in seconds.items()]
    table = markdown_table(header, rows)
    table += f"\n\nThe page answers {start:.1f} s after the command. Its examples and layout take {build:.1f} s."
    print(table)
    results = {"seconds": seconds, "start_seconds": start, "build_seconds": build, "repeats": args.repeats}
    write_report(args.output, arguments, "cpu", results, table)


if __name__ == "__main__":
    main(parse_args())
