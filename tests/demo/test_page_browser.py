"""The page in a real browser, at desktop and phone width, in light and dark.

HIDREAM_SCREENSHOTS=FOLDER keeps what it looked like.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hi_diffusers import CacheConfig, SamplingOptions, generate, load_pipeline
from hi_diffusers.pictures.metadata import read_metadata, write_picture
from tests.browser import chromium
from tests.demo.server import Server, running

pytestmark = pytest.mark.slow
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("browser") / "tmp", "--max_steps", 1000) as served:
        yield served


@pytest.fixture
def visit(browser, server):
    """Open the page; at the end, nothing may have been asked of another machine, or gone wrong in the page."""
    opened = []

    def open_page(size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        page = context.new_page()
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#draw")
        page.wait_for_selector("#expected b")
        opened.append((context, asked, faults))
        return page

    yield open_page
    for context, asked, faults in opened:
        context.close()
        elsewhere = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
        assert elsewhere == []
        assert faults == []


def keep(page: Any, name: str) -> None:
    folder = os.environ.get("HIDREAM_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def set_number(page: Any, name: str, value: object) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.press(f"#{name} input[type=number]", "Tab")


def upload(page: Any, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(str(path))


def wait_for_idle(page: Any) -> None:
    page.wait_for_selector("#draw:not([disabled])", timeout=60_000)


def test_enter_draws_and_the_steps_are_told(visit, tmp_path):
    page = visit()
    assert "13 of 50 steps full" in page.inner_text("#expected")
    page.fill("#prompt textarea", "a small red star on a white background, zeppelin")
    page.fill("#seed textarea, #seed input", "7")
    page.wait_for_function("document.querySelector('#tokens').innerText.includes('zeppelin')")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#stage .hd-full")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    report = page.inner_text("#report")
    assert "13 full, 37 forecast" in report and re.search(r"SEED\s+7\b", report)
    assert page.locator("#report .hd-bars i").count() == 50
    assert "--seed 7" in page.input_value("#command textarea")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png")["options"]["seed"] == 7
    page.click("#last")
    assert page.input_value("#seed textarea, #seed input") == "7"


def test_a_drawing_is_watched_and_stopped(visit):
    page = visit()
    page.click("#cache label:has-text('Off')")
    set_number(page, "num_steps", 1000)
    page.wait_for_function("document.querySelector('#expected').innerText.includes('All 1000')")
    page.click("#draw")
    page.wait_for_selector("#stage img", timeout=30_000)
    page.wait_for_function("/step [0-9]+ of 1000/.test(document.querySelector('#stage').innerText)")
    began = time.monotonic()
    page.click("#stop")
    page.wait_for_function("document.querySelector('#stage').innerText.includes('stopped')")
    wait_for_idle(page)
    assert time.monotonic() - began < 5, "it went on after Stop"
    page.click("#cache label:has-text('TaylorSeer')")
    set_number(page, "num_steps", 10)
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    assert "3 full, 7 forecast" in page.inner_text("#report")


@pytest.mark.parametrize(
    ("size", "scheme", "name"), [(DESKTOP, "light", "demo_desktop"), (PHONE, "dark", "demo_phone")]
)
def test_cached_and_uncached_are_compared_with_a_slider(visit, size, scheme, name):
    page = visit(size, scheme)
    page.fill("#seed textarea, #seed input", "3")
    page.click("#compare")
    page.wait_for_selector("#slider img", timeout=60_000)
    wait_for_idle(page)
    report = page.inner_text("#report")
    assert "PSNR" in report and "dB" in report and "SSIM" in report and "of 3.85×" in report
    page.wait_for_timeout(500)
    keep(page, name)
    box = page.locator("#slider").bounding_box()
    handle = page.locator("#slider [role=slider], #slider .outer, #slider .slider-wrap .inner").first
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, before["y"] + before["height"] / 2, steps=5)
    page.mouse.up()
    assert handle.bounding_box()["x"] < before["x"] - 20
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "the page is wider than the screen"


def test_a_comparison_takes_the_picture_that_was_drawn_with_the_same_settings(visit):
    page = visit()
    page.fill("#seed textarea, #seed input", "21")
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    drawn = page.inner_text("#report .hd-legend")
    page.click("#compare")
    page.wait_for_selector("#slider img", timeout=60_000)
    wait_for_idle(page)
    assert page.inner_text("#report .hd-legend") == drawn, "the cached picture was drawn once more"


def test_settings_are_loaded_from_a_picture_and_refused_from_what_is_none(visit, tmp_path):
    pipe = load_pipeline("nano", device="cpu")
    options = SamplingOptions(
        "a green tree on a pink background", seed=2**60 + 1, num_steps=20, guidance=3.5, width=80, height=48
    )
    drawn = generate(pipe, options, CacheConfig.hicache(fresh_threshold=5))
    write_picture(drawn.image, tmp_path / "ours.png", drawn.metadata)
    page = visit()
    upload(page, tmp_path / "ours.png")
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('a green tree')")
    assert page.input_value("#seed textarea, #seed input") == str(2**60 + 1)
    assert page.input_value("#num_steps input[type=number]") == "20"
    assert page.input_value("#guidance input[type=number]") == "3.5"
    assert page.is_checked("#cache label:has-text('HiCache') input")
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    assert "80×48" in page.inner_text("#report") and "4 full, 16 forecast" in page.inner_text("#report")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "none.png").write_bytes(b"\x89PNG\r\n\x1a\n<script>alert(1)</script>")
    for name, said in (("other.png", "carries no hi-diffusers metadata"), ("none.png", "not a readable")):
        upload(page, tmp_path / name)
        page.wait_for_selector(f".toast-body:has-text('{said}')")


def test_a_picture_of_the_visit_gives_back_its_settings(visit):
    page = visit()
    for seed in ("31", "32"):
        page.fill("#seed textarea, #seed input", seed)
        page.click("#draw")
        page.wait_for_function(f"document.querySelector('#report').innerText.includes('{seed}')", timeout=30_000)
        wait_for_idle(page)
    page.wait_for_selector("#history img")
    assert page.locator("#history button.thumbnail-item, #history .thumbnail-lg").count() == 2
    page.locator("#history button.thumbnail-item, #history .thumbnail-lg").nth(1).click()
    page.wait_for_function("(document.querySelector('#seed textarea, #seed input')).value === '31'")


def test_limits_are_told_and_kept(visit):
    page = visit()
    page.click("#size input")
    page.click("ul[role=listbox] >> text=Free size")
    page.wait_for_selector("label:has-text('Width') input")
    page.fill("label:has-text('Width') input", "100000")
    page.fill("label:has-text('Height') input", "1")
    page.press("label:has-text('Height') input", "Tab")
    page.wait_for_selector("#expected .hd-warn")
    page.click("#draw")
    page.wait_for_selector("#stage .hd-warn:has-text('width must be')")
    wait_for_idle(page)
    page.evaluate(
        "() => { const box = document.querySelector('#prompt textarea'); box.removeAttribute('maxlength');"
        " box.value = 'x'.repeat(5000); box.dispatchEvent(new Event('input')) }"
    )
    page.wait_for_function("document.querySelector('#tokens').innerText.includes('at most 2000 characters')")


def test_what_a_visitor_writes_is_text(visit):
    page = visit()
    page.fill("#prompt textarea", "<img src=x onerror=\"document.title='owned'\"> <b>a</b>")
    page.wait_for_function("document.querySelector('#tokens').innerText.includes('onerror')")
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    assert page.title() != "owned"
    assert page.locator("#tokens img").count() == 0


def test_another_model_brings_its_own_settings(visit):
    page = visit()
    page.click("#model label:has-text('nano-fast')")
    page.wait_for_function("document.querySelector('#num_steps input[type=number]').value === '16'")
    page.wait_for_function("document.querySelector('#expected').innerText.includes('of 16 steps')")
    assert not page.is_visible("#negative_prompt")
    page.click("#draw")
    page.wait_for_selector("#picture img", timeout=60_000)
    wait_for_idle(page)
    assert "nano-fast" in page.input_value("#command textarea")
    assert "full" in page.inner_text("text=Not on this server")


def test_enter_during_a_drawing_leaves_it_stoppable(visit):
    page = visit()
    page.click("#cache label:has-text('Off')")
    set_number(page, "num_steps", 1000)
    page.wait_for_function("document.querySelector('#expected').innerText.includes('All 1000')")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#stage .hd-full")
    page.wait_for_function("/step [0-9]+ of 1000/.test(document.querySelector('#stage').innerText)")
    page.press("#prompt textarea", "Enter")
    page.wait_for_timeout(500)
    page.click("#stop")
    page.wait_for_function("document.querySelector('#stage').innerText.includes('stopped')", timeout=5000)
    wait_for_idle(page)


def test_a_full_queue_gives_the_buttons_back(browser, tmp_path):
    with running(tmp_path / "tmp", "--max_steps", 1000, "--max_queue", 1) as small:
        pages = []
        for _ in range(3):
            page = browser.new_context().new_page()
            page.goto(small.url)
            page.wait_for_selector("#expected b")
            page.click("#cache label:has-text('Off')")
            set_number(page, "num_steps", 1000)
            page.wait_for_function("document.querySelector('#expected').innerText.includes('All 1000')")
            page.click("#draw")
            page.wait_for_selector("#stage .hd-status")
            pages.append(page)
            page.wait_for_timeout(700)
        drawing, waiting, refused = pages
        assert "step" in drawing.inner_text("#stage")
        waiting.wait_for_selector("#result >> text=/queue: 1/")
        wait_for_idle(refused)
        waiting.click("#stop")
        drawing.click("#stop")
        for page in (drawing, waiting):
            wait_for_idle(page)
        set_number(refused, "num_steps", 5)
        refused.click("#draw")
        refused.wait_for_selector("#picture img", timeout=30_000)
        for page in pages:
            page.context.close()


def test_a_small_picture_fills_its_frame(visit):
    page = visit()
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    assert page.locator("#picture img").bounding_box()["width"] > 400


def test_an_example_that_is_clicked_is_the_prompt(visit):
    page = visit()
    wanted = page.locator("#examples button, #examples td").nth(2).inner_text().strip()
    page.locator("#examples button, #examples td").nth(2).click()
    page.wait_for_function("text => document.querySelector('#prompt textarea').value === text", arg=wanted)
    assert len(wanted) > 10, "an example's number came into the prompt"


def test_a_thumbnail_shows_its_picture_large_and_loads_its_seed(visit, tmp_path):
    page = visit()
    set_number(page, "num_images", 3)
    page.fill("#seed textarea, #seed input", "20")
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#history .thumbnail-item, #history button img').length >= 3")
    wait_for_idle(page)
    page.locator("#history button:has(img)").nth(2).click()  # the newest comes first
    page.wait_for_function(
        "(document.querySelector('#seed textarea') || document.querySelector('#seed input')).value === '20'"
    )
    page.wait_for_function("document.querySelector('#picture img').src.includes('hidream-20')")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png")["options"]["seed"] == 20


def test_compare_without_a_seed_takes_the_picture_that_was_drawn(visit):
    page = visit()
    set_number(page, "num_steps", 12)
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    (seed,) = re.findall(r"SEED\s+(\d+)", page.inner_text("#report"))
    page.click("#compare")
    page.wait_for_function("document.querySelector('#report').innerText.includes('PSNR')", timeout=60_000)
    wait_for_idle(page)
    assert re.search(rf"SEED\s+{seed}\b", page.inner_text("#report"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_secondary_text_has_enough_contrast(visit, scheme):
    page = visit(scheme=scheme)
    ratio = page.evaluate(
        """() => {
            const of = color => {
                const parts = color.match(/[0-9.]+/g).map(Number).slice(0, 3).map(value => {
                    const share = value / 255;
                    return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
            };
            const note = document.querySelector('.hd-note');
            let ground = note;
            while (ground && ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(ground).backgroundColor))
                ground = ground.parentElement;
            const behind = getComputedStyle(ground || document.body).backgroundColor;
            const [a, b] = [of(getComputedStyle(note).color), of(behind)];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }"""
    )
    assert ratio >= 4.5
