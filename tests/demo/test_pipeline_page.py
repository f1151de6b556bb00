"""gradio_demo.py --pipeline: the page draws with a pipeline of diffusers, in a real browser and by its API."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hi_diffusers.demo.stock_page import StockPage
from hi_diffusers.demo.stock_requests import StockOffer
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.service.requests import Limits
from hi_diffusers.stock.source import StockSource
from tests.browser import chromium
from tests.demo.server import ROOT, Server, running
from tests.tiny_pipelines.folders import write_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipelines")
    write_folders(out)
    return out


def offer(folder: Path) -> StockOffer:
    return StockOffer(StockSource(str(folder), device="cpu"), None, Limits(num_steps=60))


def test_the_form_has_what_the_pipeline_takes(folders: Path) -> None:
    assert offer(folders / "dit").fields() == ["prompt", "seed", "num_steps", "guidance", "full_steps", "cache"]
    assert "image" in offer(folders / "qwen-image-edit").fields()
    assert {"num_frames", "fps"} <= set(offer(folders / "wan").fields())
    assert not {"num_frames", "image"} & set(offer(folders / "flux").fields())


@pytest.mark.parametrize("name", ["flux", "qwen-image-edit", "wan", "dit"])
def test_the_page_has_a_component_for_every_field(folders: Path, name: str) -> None:
    offered = offer(folders / name)
    page = StockPage(offered)
    assert list(page.fields) == offered.fields()
    page.close()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "steps": ("flux", {"num_steps": 61}, "num_steps must be a whole number from 1 to 60"),
    "no number": ("flux", {"num_steps": "x"}, "num_steps must be a whole number"),
    "half": ("flux", {"width": 64.5}, "width must be a whole number"),
    "size": ("flux", {"width": 4096, "height": 4096}, "pixels"),
    "frames": ("wan", {"num_frames": 1001}, "num_frames must be at most 257"),
    "an option of others": ("flux", {"num_frames": 5}, "num_frames is not a setting of FluxPipeline"),
    "a path": ("flux", {"calibration": "/etc/passwd"}, "calibration is not a setting"),
    "a prompt": ("flux", {"prompt": "a" * 3000}, "prompt must be text of at most 2000"),
    "no text": ("flux", {"prompt": ["a"]}, "prompt must be text"),
    "guidance": ("flux", {"guidance": "nan"}, "guidance must be a number"),
    "a class": ("dit", {"prompt": "cat"}, "prompt must be a class's number or name"),
    "a cache": ("flux", {"cache": "best"}, "cache must be on or off"),
    "a budget": ("flux", {"num_steps": 10, "full_steps": 20}, "full_steps"),
    "no picture": ("qwen-image-edit", {}, "image must be given"),
    "a file that is no picture": ("qwen-image-edit", {"image": "/etc/passwd"}, "image must be a PNG, JPEG or WebP"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_visitor_may_not_ask_for_is_refused(folders: Path, name: str) -> None:
    folder, values, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        offer(folders / folder).check({"prompt": "1" if folder == "dit" else "a"} | values)


def test_flags_are_checked_before_the_page_is_made(folders: Path, tmp_path: Path) -> None:
    for flags, message in (
        (("--pipeline", folders / "flux", "--num_frames", 5), "--num_frames has no effect here"),
        (("--pipeline", tmp_path), "has no model_index.json"),
        (("--fps", 5), "--fps has no effect without --pipeline"),
    ):
        command = [sys.executable, str(ROOT / "gradio_demo.py"), *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) <= 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def served(folder: Path, tmp_path: Path) -> Any:
    tmp_path.mkdir(exist_ok=True)
    return running(tmp_path / "tmp", "--pipeline", folder)


def visit(browser: Any, server: Server) -> tuple[Any, list[str]]:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#draw")
    return page, faults


def fill(page: Any, **numbers: int) -> None:
    for name, value in numbers.items():
        page.fill(f"#{name} input[type=number]", str(value))
        page.press(f"#{name} input[type=number]", "Tab")


def wait_for_idle(page: Any) -> None:
    page.wait_for_selector("#draw:not([disabled])", timeout=60_000)


@pytest.mark.slow
def test_a_picture_is_drawn_stopped_and_downloaded(browser: Any, folders: Path, tmp_path: Path) -> None:
    with served(folders / "flux", tmp_path) as server:
        page, faults = visit(browser, server)
        fill(page, width=64, height=64, num_steps=40, full_steps=10)
        page.fill("#seed textarea, #seed input", "7")
        page.fill("#prompt textarea", "a red circle <b>x</b>")
        page.press("#prompt textarea", "Enter")
        page.wait_for_selector("#picture img")
        wait_for_idle(page)
        assert "10 full, 30 forecast" in page.inner_text("#report") and "seed 7" in page.inner_text("#report")
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "a.png")
        metadata = read_metadata(tmp_path / "a.png")
        assert metadata["options"]["prompt"] == "a red circle <b>x</b>" and metadata["options"]["seed"] == 7
        fill(page, width=256, height=256, num_steps=100, full_steps=0)
        page.click("#cache label:has-text('off')")
        page.click("#draw")
        page.wait_for_function("/step [0-9]+ of 100/.test(document.querySelector('#stage')?.innerText)")
        page.click("#stop")
        page.wait_for_function("document.querySelector('#stage')?.innerText.includes('stopped')")
        wait_for_idle(page)
        fill(page, width=60)
        page.click("#draw")
        page.wait_for_function("document.querySelector('#stage')?.innerText.includes('multiple of 16')")
        wait_for_idle(page)
        assert faults == []


@pytest.mark.slow
def test_a_video_an_edit_and_a_class_are_drawn(browser: Any, folders: Path, tmp_path: Path) -> None:
    with served(folders / "wan", tmp_path / "a") as server:
        page, faults = visit(browser, server)
        fill(page, width=32, height=32, num_frames=5, num_steps=12, full_steps=4)
        page.click("#draw")
        page.wait_for_selector("#picture img")
        wait_for_idle(page)
        assert "WanPipeline" in page.inner_text("#settings .cm-content") and faults == []
    picture = tmp_path / "in.png"
    Image.new("RGB", (64, 64), "green").save(picture)
    with served(folders / "qwen-image-edit", tmp_path / "b") as server:
        page, faults = visit(browser, server)
        page.set_input_files("#image input[type=file]", str(picture))
        page.wait_for_selector("#image img")
        fill(page, width=64, height=64, num_steps=6, full_steps=3)
        page.fill("#prompt textarea", "make it blue")
        page.click("#draw")
        page.wait_for_selector("#picture img")
        wait_for_idle(page)
        assert "3 full, 3 forecast" in page.inner_text("#report") and faults == []
    with served(folders / "dit", tmp_path / "c") as server:
        page, faults = visit(browser, server)
        fill(page, num_steps=12, full_steps=4)
        page.click("#draw")
        page.wait_for_selector("#picture img")
        wait_for_idle(page)
        assert "4 full, 8 forecast" in page.inner_text("#report") and faults == []
