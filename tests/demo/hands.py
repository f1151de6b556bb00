"""What a visitor does with the page in a real browser. HIDREAM_SCREENSHOTS=FOLDER keeps what it looked like."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.demo.server import Server

DESKTOP, TABLET, PHONE = (1280, 900), (820, 1180), (390, 844)


@contextlib.contextmanager
def visits(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end, nothing may have been asked of another machine, or gone wrong in the page."""
    opened = []

    def open_page(size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        page = context.new_page()
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url)
        wait_for_page(page)
        opened.append((context, asked, faults))
        return page

    yield open_page
    for context, asked, faults in opened:
        context.close()
        elsewhere = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
        assert elsewhere == []
        assert faults == []


def wait_for_page(page: Any) -> None:
    """Wait until the page is there, with what the browser kept."""
    page.wait_for_selector("#draw")
    page.wait_for_selector("#expected b")
    page.wait_for_function("window.hidreamRestored === true")


def keep(page: Any, name: str) -> None:
    folder = os.environ.get("HIDREAM_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def set_number(page: Any, name: str, value: object) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.press(f"#{name} input[type=number]", "Tab")


def set_text(page: Any, name: str, value: str) -> None:
    page.fill(f"#{name} textarea, #{name} input", value)
    page.press(f"#{name} textarea, #{name} input", "Tab")


def upload(page: Any, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(str(path))


def wait_for_idle(page: Any) -> None:
    page.wait_for_selector("#draw:not([disabled])", timeout=60_000)


def wait_for_text(page: Any, name: str, text: str) -> None:
    page.wait_for_selector(f"#{name}:has-text('{text}')", timeout=30_000)


def open_saving(page: Any) -> None:
    if not page.is_visible("#cache"):
        page.click("#saving > button")
    page.wait_for_selector("#cache")
