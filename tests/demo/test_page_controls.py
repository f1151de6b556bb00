"""Every control of the page is used once in a real browser, and has its effect; nothing is hard to see or nameless."""

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from hi_diffusers.pictures.metadata import read_metadata
from tests.browser import chromium
from tests.demo.hands import (
    DESKTOP,
    PHONE,
    TABLET,
    keep,
    open_saving,
    set_number,
    set_text,
    upload,
    visits,
    wait_for_idle,
    wait_for_page,
    wait_for_text,
)
from tests.demo.server import Server, running
from tests.hub_server import serve
from tests.lora_file import write_lora

pytestmark = pytest.mark.slow
SEED = "#seed textarea, #seed input"
OF_PAINTING = {"start_file", "paint", "strength", "fit", "use", "before", "mask"}
"""Controls of tests/demo/test_page_browser.py, which paints, draws and compares with them."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory, tiny_folder, nano_folder) -> Iterator[Server]:
    """A page with a LoRA, and with a hub on this machine that has the model `full`, of random weights."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "loras").mkdir()
    write_lora(nano_folder, folder / "loras" / "wobble.safetensors", size=1.0)
    full = shutil.copytree(tiny_folder, folder / "full")
    config = json.loads((full / "transformer" / "config.json").read_text())
    (full / "transformer" / "config.json").write_text(json.dumps(config | {"max_resolution": [256, 256]}))
    with serve() as hub:
        hub.repos["HiDream-ai/HiDream-I1-Full"] = full
        online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(folder / "cache")}
        flags = ("--lora_folder", folder / "loras", "--allow_download", "--max_steps", 1000)
        with running(folder / "tmp", *flags, environment=online) as served:
            yield served


@pytest.fixture
def visit(browser, server):
    with visits(browser, server) as open_page:
        yield open_page


def controls_of(page: Any) -> set[str]:
    """The names of all components that can be used, shown or not."""
    script = """() => window.gradio_config.components
        .filter(one => one.props.elem_id && !["html", "column", "row", "group", "state"].includes(one.type))
        .filter(one => one.props.interactive !== false || ["gallery", "image", "imageslider"].includes(one.type))
        .map(one => one.props.elem_id)"""
    return set(page.evaluate(script))


def thumbnails(page: Any, name: str) -> Any:
    return page.locator(f"#{name} button:has(img)")


def test_every_control_has_its_effect(visit, tmp_path):
    page = visit()
    left = controls_of(page) - OF_PAINTING
    assert len(left) > 30, "the page's components were not found"

    def done(*names: str) -> None:
        for name in names:
            left.remove(name)

    # what is asked
    page.click("#examples button:has-text('a small red star')")
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('a small red star')")
    set_text(page, "prompt", "a small blue circle on a white background")
    wait_for_text(page, "tokens", "10 of 32")
    set_text(page, "negative_prompt", "red")
    done("examples", "prompt", "negative_prompt")
    page.click("#quality label:has-text('Draft')")
    wait_for_text(page, "expected", "8 of 50 steps full")
    page.click("#size label:has-text('80 × 48')")
    set_number(page, "num_images", 2)
    set_text(page, "seed", "11")
    page.wait_for_selector("#lock input:checked")
    done("quality", "size", "num_images", "seed")

    # drawn: a grid, of which one is chosen
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#grid img').length === 2")
    wait_for_idle(page)
    assert "80×48" in page.inner_text("#report")
    thumbnails(page, "grid").nth(0).click()
    page.wait_for_function("document.querySelector('#command textarea').value.includes('--seed 11')")
    command = page.input_value("#command textarea")
    assert "--quality draft" in command and "--negative_prompt red" in command
    assert page.is_visible("#picture img") and page.is_visible("#grid img")
    done("draw", "grid", "picture")
    smooth = "getComputedStyle(document.querySelector('#picture img')).imageRendering"
    assert page.evaluate(smooth) == "pixelated"
    page.click("#pixels input")
    page.wait_for_function(f"{smooth} === 'auto'")
    page.click("#pixels input")
    page.wait_for_function(f"{smooth} === 'pixelated'")
    done("pixels")
    page.click("#enlarge label:has-text('4 times')")
    page.wait_for_function("document.querySelector('#picture img').naturalWidth === 320")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (320, 192)
    assert read_metadata(tmp_path / "large.png")["enlarged"]["factor"] == 4
    done("enlarge", "download")

    # the seed is let go, and the visit's pictures are used
    page.click("#lock input")
    page.wait_for_function(f"document.querySelector('{SEED}').value === ''")
    page.click("#lock input")
    page.wait_for_function(f"document.querySelector('{SEED}').value === '12'")
    done("lock")
    page.click("#earlier button:has-text('a small blue circle')")
    thumbnails(page, "history").nth(1).click()
    page.wait_for_function(f"document.querySelector('{SEED}').value === '11'")
    assert page.input_value("#num_images input[type=number]") == "1"
    page.click("#beside")
    wait_for_text(page, "beside", "choose the other one")
    thumbnails(page, "history").nth(0).click()
    page.wait_for_selector("#slider img")
    wait_for_text(page, "report", "PSNR")
    keep(page, "two_of_the_visit")
    with page.expect_download() as download:
        page.click("#pack")
    download.value.save_as(tmp_path / "all.zip")
    assert len(zipfile.ZipFile(tmp_path / "all.zip").namelist()) == 2
    done("earlier", "history", "beside", "slider", "pack", "archive")

    # models, LoRA, steps
    page.click("#model label:has-text('nano-dev')")
    page.wait_for_function("document.querySelector('#num_steps input[type=number]').value === '28'")
    page.click("#model label >> text=/^nano$/")
    page.wait_for_function("document.querySelector('#num_steps input[type=number]').value === '50'")
    done("model")
    set_number(page, "num_steps", 40)
    set_number(page, "guidance", 2.5)
    page.click("#size label:has-text('64 × 64')")
    wait_for_text(page, "expected", "8 of 40 steps")
    page.click("#quality label:has-text('Medium')")
    wait_for_text(page, "expected", "needs a calibration")
    page.click("#quality label:has-text('Standard')")
    wait_for_text(page, "expected", "of 40 steps")
    page.click("#draw")
    page.wait_for_function("/--num_steps 40/.test(document.querySelector('#command textarea')?.value)")
    wait_for_idle(page)
    plain = page.get_attribute("#picture img", "src")
    page.click("#lora input")
    page.click("ul[role=listbox] >> text=wobble")
    set_number(page, "lora_scale", 1.5)
    page.click("#draw")
    page.wait_for_function("/--lora wobble.safetensors:1.5/.test(document.querySelector('#command textarea')?.value)")
    wait_for_idle(page)
    assert page.get_attribute("#picture img", "src") != plain and "--guidance 2.5" in page.input_value(
        "#command textarea"
    )
    done("lora", "lora_scale", "num_steps", "guidance")

    # how steps are saved
    open_saving(page)
    page.click("#cache label:has-text('TaylorSeer')")
    wait_for_text(page, "expected", "module by")
    set_text(page, "full_steps", "4")
    wait_for_text(page, "expected", "4 of 40 steps full")
    set_text(page, "full_steps", "")
    set_text(page, "fresh_threshold", "20")
    wait_for_text(page, "expected", "2 of 40 steps full")
    set_text(page, "fresh_threshold", "")
    set_text(page, "full_steps", "6")
    for name, choice, said in (
        ("target", "the finished picture", "x0 by"),
        ("schedule", "denser at the start", "power"),
        ("basis", "damped", "Hermite"),
    ):
        page.click(f"#{name} input")
        page.click(f"ul[role=listbox] >> text=/{choice}/")
        wait_for_text(page, "expected", said)
    set_text(page, "max_order", "9")
    wait_for_text(page, "expected", "max_order must be")
    set_text(page, "max_order", "2")
    page.wait_for_selector("#expected b")
    done("saving", "cache", "full_steps", "fresh_threshold", "target", "schedule", "basis", "max_order")
    page.click("#compare")
    page.wait_for_selector("#slider img", timeout=60_000)
    wait_for_idle(page)
    done("compare")

    # settings of a file; a drawing that is stopped
    upload(page, tmp_path / "large.png")
    page.wait_for_function("document.querySelector('#num_steps input[type=number]').value === '50'")
    wait_for_text(page, "expected", "8 of 50 steps full")
    set_number(page, "num_steps", 1000)
    page.click("#cache label:has-text('Off')")
    wait_for_text(page, "expected", "All 1000")
    page.click("#draw")
    page.wait_for_function("/step [0-9]+ of 1000/.test(document.querySelector('#stage').innerText)")
    page.click("#stop")
    wait_for_text(page, "stage", "stopped")
    wait_for_idle(page)
    done("upload")

    # a size of one's own
    page.click("#size label:has-text('Free')")
    set_number(page, "width", 96)
    set_number(page, "height", 96)
    page.wait_for_selector("#expected b")
    done("width", "height")

    # a model that is downloaded
    page.click("#absent > button")
    page.click("#wanted input")
    page.click("ul[role=listbox] >> text=full")
    page.click("#fetch")
    wait_for_text(page, "fetched", "full can be chosen now")
    page.click("#model label >> text=/^full$/")
    page.wait_for_selector("#size label:has-text('1360 × 768')")
    assert not page.is_visible("#pixels")
    done("absent", "wanted", "fetch")

    page.click("#start > button")
    page.wait_for_selector("#start_file")
    done("start")
    assert left == set(), "controls that no step above has used"


def test_settings_prompts_and_pictures_survive_a_reload(visit):
    page = visit()
    set_text(page, "prompt", "a large green square on a black background")
    page.click("#model label:has-text('nano-fast')")
    page.wait_for_function("document.querySelector('#num_steps input[type=number]').value === '16'")
    page.click("#size label:has-text('48 × 80')")
    set_text(page, "seed", "77")
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    report, command = page.inner_text("#report"), page.input_value("#command textarea")
    set_number(page, "num_steps", 12)
    wait_for_text(page, "expected", "of 12 steps")
    page.reload()
    wait_for_page(page)
    assert page.input_value("#prompt textarea") == "a large green square on a black background"
    assert page.input_value(SEED) == "77" and page.input_value("#num_steps input[type=number]") == "12"
    assert page.is_checked("#model label:has-text('nano-fast') input")
    assert page.is_checked("#size label:has-text('48 × 80') input")
    assert page.inner_text("#earlier button") == "a large green square on a black background"
    thumbnails(page, "history").nth(0).click()
    page.wait_for_function("document.querySelector('#command textarea')?.value.length > 0")
    assert page.inner_text("#report") == report and page.input_value("#command textarea") == command
    assert page.input_value("#num_steps input[type=number]") == "16"
    other = visit()
    assert not other.is_visible("#history"), "another visitor sees it"


def test_a_reload_during_a_drawing_loses_nothing_of_before(visit):
    page = visit()
    set_text(page, "seed", "5")
    page.click("#draw")
    page.wait_for_selector("#picture img")
    wait_for_idle(page)
    open_saving(page)
    page.click("#cache label:has-text('Off')")
    set_number(page, "num_steps", 1000)
    wait_for_text(page, "expected", "All 1000")
    page.click("#draw")
    page.wait_for_function("/step [0-9]+ of 1000/.test(document.querySelector('#stage').innerText)")
    page.reload()
    wait_for_page(page)
    page.wait_for_selector("#history img")
    set_number(page, "num_steps", 10)
    page.click("#draw")
    page.wait_for_selector("#picture img", timeout=30_000)
    wait_for_idle(page)
    assert thumbnails(page, "history").count() == 2


def test_the_keyboard_reaches_and_works_every_part(visit):
    """Tab goes through the page in the order in which it is read, and the focus can be seen."""
    page = visit()
    page.focus("#prompt textarea")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
    order = [
        name for name in ("negative_prompt", "draw", "compare", "quality", "num_images", "size") if name in reached
    ]
    assert len(order) == 6, reached
    assert [reached.index(name) for name in order] == sorted(reached.index(name) for name in order)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, TABLET, PHONE], ids=["desktop", "tablet", "phone"])
def test_nothing_is_hard_to_see_or_without_a_name(visit, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

    def check(when: str) -> None:
        page.wait_for_timeout(400)  # until colours have faded in
        found = axe.Axe().run(page).response["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        told = [f"{one['id']}: {[node['target'] for node in one['nodes']]}" for one in serious]
        assert told == [], when

    page = visit(size, scheme)
    check("fresh")
    keep(page, f"page_fresh_{size[0]}_{scheme}")
    set_number(page, "num_images", 4)
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#grid img').length === 4", timeout=30_000)
    wait_for_idle(page)
    check("several pictures")
    keep(page, f"page_grid_{size[0]}_{scheme}")
    thumbnails(page, "grid").nth(1).click()
    page.wait_for_selector("#picture img")
    open_saving(page)
    page.click("#absent > button")
    page.click("#start > button")
    check("everything is open")
    keep(page, f"page_open_{size[0]}_{scheme}")
    set_number(page, "num_images", 1)
    page.click("#compare")
    page.wait_for_selector("#slider img", timeout=60_000)
    wait_for_idle(page)
    check("a comparison")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "the page is wider than the screen"
    assert re.search(r"PSNR", page.inner_text("#report"))
