"""The page in a real browser, at desktop and phone width, in light and dark."""

import re
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hi_diffusers import CacheConfig, SamplingOptions, generate, load_pipeline
from hi_diffusers.pictures.metadata import read_metadata, write_picture
from tests.browser import chromium
from tests.demo.hands import DESKTOP, PHONE, keep, open_saving, set_number, upload, visits, wait_for_idle, wait_for_page
from tests.demo.server import Server, running

pytestmark = pytest.mark.slow


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
    with visits(browser, server) as open_page:
        yield open_page


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
    page.wait_for_selector("#lock input:checked")


def test_a_drawing_is_watched_and_stopped(visit):
    page = visit()
    open_saving(page)
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
    open_saving(page)
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
    page.locator("#slider").scroll_into_view_if_needed()
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
    open_saving(page)
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
    page.wait_for_function("document.querySelector('#command textarea').value.includes('--seed 31')")
    assert re.search(r"SEED\s+31\b", page.inner_text("#report")), "the figures are another picture's"


def test_limits_are_told_and_kept(visit):
    page = visit()
    page.click("#size label:has-text('Free')")
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
    open_saving(page)
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
            wait_for_page(page)
            open_saving(page)
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


def test_escape_stops_the_drawing(visit):
    page = visit()
    open_saving(page)
    page.click("#cache label:has-text('Off')")
    set_number(page, "num_steps", 1000)
    page.wait_for_function("document.querySelector('#expected').innerText.includes('All 1000')")
    page.keyboard.press("Escape")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#stage .hd-full")
    page.wait_for_function("/step [0-9]+ of 1000/.test(document.querySelector('#stage').innerText)")
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('#stage').innerText.includes('stopped')", timeout=5000)
    wait_for_idle(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_prompt_draw_and_picture_on_one_screen(visit, scheme):
    page = visit(PHONE, scheme)
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    keep(page, f"demo_one_screen_{scheme}")
    assert page.evaluate("scrollY") == 0
    boxes = [page.locator(name).bounding_box() for name in ("#prompt", "#draw", "#picture")]
    assert all(box["y"] >= 0 and box["y"] + box["height"] <= PHONE[1] for box in boxes), boxes
    assert page.locator("#examples").bounding_box()["y"] > boxes[-1]["y"]


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
    page.wait_for_function("document.querySelector('#picture img')?.src.includes('hidream-20')")
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


def paint_right_half(page: Any) -> None:
    """Paint over the right half of the picture in gradio's editor, which shows it in the middle, as large as it can."""
    page.wait_for_selector("#paint canvas")
    page.wait_for_timeout(1500)  # until the picture is on the canvas
    frame = page.locator("#paint canvas").first.bounding_box()
    page.locator("#paint").scroll_into_view_if_needed()
    frame = page.locator("#paint canvas").first.bounding_box()
    middle, height = frame["x"] + frame["width"] / 2, frame["height"]
    for row in range(24):
        at = frame["y"] + 25 + (height - 35) * row / 23
        page.mouse.move(middle + 40, at)
        page.mouse.down()
        page.mouse.move(frame["x"] + frame["width"] - 5, at, steps=6)
        page.mouse.up()


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_a_mask_is_painted_drawn_and_compared(visit, tmp_path, size, scheme):
    picture = Image.new("RGB", (192, 128), (40, 60, 200))
    ImageDraw.Draw(picture).ellipse((60, 28, 132, 100), fill=(220, 30, 30))
    picture.save(tmp_path / "in.png")
    page = visit(size, scheme)
    page.click("#start >> text=Start from a picture")
    page.set_input_files("#start_file input[type=file]", str(tmp_path / "in.png"))
    page.wait_for_function("document.querySelector('#expected').innerText.includes('of 30 steps full')")
    page.fill("#prompt textarea", "a large green square on a yellow background")
    page.fill("#seed textarea, #seed input", "5")
    page.click("#draw")
    page.wait_for_selector("#picture img", timeout=30_000)
    wait_for_idle(page)
    assert "--mask" not in page.input_value("#command textarea"), "nothing was painted yet"
    page.click("#before input")
    page.wait_for_selector("#slider img")
    page.wait_for_timeout(500)
    keep(page, f"demo_start_{scheme}")
    set_number(page, "strength", 1)
    paint_right_half(page)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#command textarea')?.value.includes('--mask in-mask.png')")
    wait_for_idle(page)
    report = page.inner_text("#report")
    assert "72×48" in report and "of 50 steps" in page.locator("#report .hd-bars").get_attribute("aria-label")
    keep(page, f"demo_mask_{scheme}")
    for button, name in (("#download", "drawn.png"), ("#mask", "mask.png")):
        with page.expect_download() as download:
            page.click(button)
        download.value.save_as(tmp_path / name)
    metadata = read_metadata(tmp_path / "drawn.png")
    for name, file in (("image", "in.png"), ("mask_image", "mask.png")):
        assert metadata["options"][name] == sha256((tmp_path / file).read_bytes()).hexdigest()
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    assert mask.shape == (128, 192) and mask[:, :80].max() == 0 and (mask[10:-10, 120:-10] == 255).mean() > 0.9
    kept = np.asarray(picture.resize((72, 48), Image.Resampling.LANCZOS)).astype(int)
    drawn = np.asarray(Image.open(tmp_path / "drawn.png")).astype(int)
    assert (kept[:, :28] == drawn[:, :28]).all() and np.abs(kept - drawn)[:, 50:-4].mean() > 20
    pipe = load_pipeline("nano", device="cpu")
    options = SamplingOptions(
        metadata["options"]["prompt"], seed=5, image=tmp_path / "in.png", mask_image=tmp_path / "mask.png", strength=1
    )
    again = np.asarray(generate(pipe, options, CacheConfig.best()).image).astype(int)
    assert np.abs(again - drawn).max() <= 1, "the downloaded mask draws another picture"
    page.click("#compare")
    page.wait_for_function("document.querySelector('#report').innerText.includes('PSNR')", timeout=60_000)
    wait_for_idle(page)
    page.click("#use")
    page.wait_for_function("document.querySelector('#start_file').innerText.includes('hidream-5')")
    page.locator("#history button:has(img)").last.click()  # the first drawing, which had no paint
    page.wait_for_function(r"document.querySelector('#start_file').innerText.replace(/\s/g, '').includes('in.png')")
    assert page.input_value("#strength input[type=number]") == "0.6"
    page.click("#start_file button[aria-label=Clear], #start_file button[aria-label=Remove]")
    page.wait_for_function("document.querySelector('#expected').innerText.includes('of 50 steps full')")
    assert not page.is_visible("#paint")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "the page is wider than the screen"


def test_a_waiting_drawing_starts_from_the_picture_it_was_asked_with(visit, tmp_path):
    first, second = visit(), visit()
    open_saving(first)
    first.click("#cache label:has-text('Off')")
    set_number(first, "num_steps", 1000)
    first.wait_for_function("document.querySelector('#expected').innerText.includes('All 1000')")
    first.click("#draw")
    first.wait_for_selector("#stage .hd-full")
    first.wait_for_function("/step [0-9]+ of 1000/.test(document.querySelector('#stage').innerText)")
    for color in ("blue", "red"):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{color}.png")
    second.click("#start >> text=Start from a picture")
    second.set_input_files("#start_file input[type=file]", str(tmp_path / "blue.png"))
    second.wait_for_function("document.querySelector('#expected').innerText.includes('of 30 steps full')")
    second.click("#draw")
    second.wait_for_timeout(700)
    second.click("#start_file button[aria-label=Clear], #start_file button[aria-label=Remove]")
    second.set_input_files("#start_file input[type=file]", str(tmp_path / "red.png"))
    second.wait_for_timeout(700)
    first.click("#stop")
    second.wait_for_selector("#picture img", timeout=30_000)
    wait_for_idle(second)
    assert "--image blue.png" in second.input_value("#command textarea")


def test_what_is_no_picture_is_not_started_from(visit, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    page = visit()
    page.click("#start >> text=Start from a picture")
    page.set_input_files("#start_file input[type=file]", str(tmp_path / "a.png"))
    page.wait_for_selector(".toast-body:has-text('image must be a PNG, JPEG or WebP picture, got a.png')")
    assert not page.is_visible("#paint")


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
