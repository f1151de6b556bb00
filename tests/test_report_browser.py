"""The comparison's page in a real browser."""

from pathlib import Path

import pytest

from hi_diffusers.commands import compare
from tests.browser import chromium
from tests.test_compare import picture, write_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_its_pairs_at_desktop_and_phone_width(tmp_path: Path, width: int) -> None:
    a = write_run(tmp_path / "a", {index: picture(index) for index in range(5)})
    b = write_run(tmp_path / "b", {index: picture(index + 10) for index in range(6)})
    assert compare.main([str(a), str(b), "--report", str(tmp_path / "report.html"), "--worst", "4"]) == 0
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked_for: list[str] = []
        page.on("request", lambda request: asked_for.append(request.url))
        page.goto(f"file://{tmp_path}/report.html")
        assert page.locator("figure").count() == 4
        loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
        assert loaded == [32] * 8
        assert page.locator("li").inner_text() == f"prompt 5, image 0: only in {b}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
        assert [url for url in asked_for if not url.startswith(("file:", "data:"))] == []
