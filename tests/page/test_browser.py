"""
A browser uses every tab of the page that `pipelines/app.py` serves.

It needs Chromium, such as Debian's package chromium-headless-shell. Without one the tests are skipped, or fail if
FLOWBACK_REQUIRE_BROWSER is set.
"""

import os
import shutil
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import httpx
import PIL.Image
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ..conftest import REPOSITORY


BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
# On an idle machine every step takes about a second.
TIMEOUT = 60_000
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        message = f"none of {', '.join(BROWSERS)} is installed"
        pytest.fail(message) if os.environ.get("FLOWBACK_REQUIRE_BROWSER") else pytest.skip(message)
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, which runs the tests in containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser, page, tmp_path_factory):
    """The address of the page, served by the command, in a process of its own."""
    folder = tmp_path_factory.mktemp("flow")
    page.pipeline.save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = str(REPOSITORY / "pipelines" / "app.py")
    command = [sys.executable, script, "--model", str(folder), "--server_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}/"
    for line in process.stdout:
        if address.rstrip("/") in line:
            break
    else:
        pytest.fail(f"the page did not start: {process.wait()}")
    yield address
    process.terminate()
    process.wait()
    process.stdout.close()


class Visit:
    """A visitor of the page. What must never happen is noted."""

    def __init__(self, browser: Browser, address: str, **options):
        self.tab: Page = browser.new_page(**options)
        self.tab.set_default_timeout(TIMEOUT)
        self.faults: list[str] = []
        self.tab.on("request", self._note_request)
        self.tab.on(
            "response", lambda answer: answer.status >= 400 and self.faults.append(f"{answer.status} {answer}")
        )
        self.tab.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.tab.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.tab.goto(address)

    def _note_request(self, request):
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.hostname != "127.0.0.1":
            self.faults.append(f"leaves this machine: {request.url}")

    def open(self, *names: str):
        for name in names:
            self.tab.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str):
        self.tab.get_by_role("button", name=name, exact=True).click()

    def choose_example(self, number: int):
        """Click an example, and wait until it is in the component that it belongs to, which was empty."""
        filled = self.tab.locator("button[aria-label='Remove Image']:visible")
        num_filled = filled.count()
        self.tab.locator(f"img[src*=example_{number}]:visible").last.click()
        expect(filled).to_have_count(num_filled + 1)

    def upload(self, path):
        self.tab.locator("input[type=file]:visible, .picture:visible input[type=file]").first.set_input_files(path)

    def image(self, label: str):
        """The image of the component with this label."""
        return self.tab.locator(".block:visible", has_text=label).last.locator("img")

    def see(self, text: str):
        expect(self.tab.get_by_text(text).first).to_be_visible()


@pytest.fixture
def visit(browser, server):
    visit = Visit(browser, server, viewport={"width": 1200, "height": 900})
    yield visit
    visit.tab.close()
    assert not visit.faults


def test_sample(visit):
    images = visit.tab.locator(".grid-container img")
    visit.press("Sample")
    expect(images).to_have_count(8)
    visit.tab.get_by_label("Classes").click()
    visit.tab.get_by_role("option", name="dog").click()
    visit.tab.get_by_role("spinbutton", name="number input for Images").fill("3")
    visit.press("Sample")
    expect(images).to_have_count(3)


def test_upload_and_classify(visit, image_file, tmp_path):
    visit.open("Classify")
    visit.press("Classify the image")
    visit.see("There is no image yet")
    (tmp_path / "text.png").write_text("not an image")
    visit.upload(tmp_path / "text.png")
    visit.press("Classify the image")
    visit.see("it is not an image")
    visit.tab.get_by_label("Clear").first.click()
    PIL.Image.new("RGB", (64, 32), "gray").save(tmp_path / "photo.png")
    visit.upload(tmp_path / "photo.png")
    visit.press("Classify the image")
    visit.see("which has 64x32 pixels, is resized to 8x8")
    visit.see("nats")
    expect(visit.image("What the flow sees")).to_be_visible()


def test_draw_and_classify(visit):
    visit.open("Classify", "Draw")
    visit.press("Classify the drawing")
    visit.see("The canvas is empty")
    canvas = visit.tab.locator("canvas").first.bounding_box()
    x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    visit.tab.mouse.move(x, y - 60)
    visit.tab.mouse.down()
    visit.tab.mouse.move(x, y + 60, steps=5)
    visit.tab.mouse.up()
    visit.press("Classify the drawing")
    visit.see("nats")
    expect(visit.image("What the flow sees")).to_be_visible()


def test_invert_and_edit(visit):
    visit.open("Edit")
    visit.choose_example(1)
    visit.press("Invert")
    visit.see("differs by at most")
    expect(visit.image("Made from the noise")).to_be_visible()
    visit.open("Swap class")
    visit.press("Swap the class")
    expect(visit.image("As the other class")).to_be_visible()
    visit.open("Vary")
    visit.tab.get_by_role("slider").first.press("ArrowRight")
    visit.press("Vary")
    expect(visit.tab.locator(".grid-container:visible img")).to_have_count(8)


def test_interpolate_with_the_slider(visit):
    visit.open("Edit")
    visit.choose_example(1)
    visit.open("Interpolate")
    visit.choose_example(2)
    visit.press("Interpolate")
    between = visit.image("Between")
    expect(between).to_be_visible()
    middle = between.get_attribute("src")
    visit.tab.get_by_role("slider").first.press("End")
    expect(between).not_to_have_attribute("src", middle)


def test_likelihood_map(visit):
    visit.open("Likelihood")
    visit.choose_example(3)
    visit.press("Map the likelihood")
    visit.see("which sum to")
    expect(visit.image("Against typical images")).to_be_visible()


def test_names_of_classes_are_shown_as_text(visit):
    """Class 4 is called by a tag that would open a dialog."""
    visit.open("Likelihood")
    visit.choose_example(3)
    visit.tab.get_by_label("Class of the image").last.click()
    visit.tab.get_by_role("option", name="onerror").click()
    visit.press("Map the likelihood")
    visit.see("was read as class <img src=x onerror=alert(1)>")


def test_a_phone(browser, server):
    visit = Visit(browser, server, viewport=PHONE, has_touch=True, is_mobile=True)
    for name in ("Sample", "Classify", "Edit", "Likelihood"):
        visit.open(name)
        # Layouts are fractional: of 32 pixels, half a one may be clipped.
        expect(visit.tab.get_by_role("tab", name=name, exact=True)).to_be_in_viewport(ratio=1 - 0.5 / 32)
        assert visit.tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    visit.choose_example(3)
    visit.press("Map the likelihood")
    visit.see("which sum to")
    visit.tab.close()
    assert not visit.faults


def test_it_listens_on_one_address_of_this_machine_only(server):
    """A server on all addresses would also answer on this one."""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.2:{urlsplit(server).port}/", timeout=5)
