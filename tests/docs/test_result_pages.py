"""HTML pages of search, duplicates and probe: complete and self-contained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from site_building import Watch, look_at

from backbones.embedding.page import Table, write_page
from backbones.embedding.sheet import Row, Tile

# What a file may be called, and what no page may run.
HOSTILE = '<img src=x onerror=alert(1)></script><script>alert(2)</script>&".png'


def image(side: int) -> Image.Image:
    pixels = np.random.default_rng(side).integers(0, 255, (side, side + 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything that the three commands put on one."""
    folder = tmp_path_factory.mktemp("page")
    image(60).save(folder / "a.png")
    query = Tile(image(300), "query", "a/very/long/name/" + "x" * 200 + ".jpg", framed=True)
    found = [Tile(image(100 + i), f"{i}   0.9{i}0", f"found/{i}.jpg") for i in range(9)]
    mistakes = [
        Tile(image(8), "3 → 8   98 %", HOSTILE, group="linear: 3 → 8"),
        Tile(None, "13 → 8   70 %", "gone.png", group="linear: 13 → 8"),
        Tile(image(9), "3 → 8   60 %", "@title@.png", group="linear: 3 → 8"),
    ]
    rows = [Row(HOSTILE, [query, *found]), Row("3 mistakes", mistakes)]
    groups = ["linear: 3 → 8", "linear: 13 → 8"]
    tables = [
        Table(("method", "accuracy", "interval " * 9), [["linear", "98 %", "1 … 2 " * 9]]),
        Table(("class", "taken for", "images"), [["3", "8", "2"], ["13", "8", "1"]], groups),
    ]
    data = (folder / "a.png").read_bytes()
    facts = {"model": HOSTILE, "images": "/" + "folder" * 60}
    write_page(folder / "a.html", HOSTILE, facts, rows, tables, data, "what is taken for what")
    return folder / "a.html"


@pytest.fixture
def opened(browser, page, request):
    """The page in the browser; in the end nothing may have gone wrong or been asked for."""
    browser.get("about:blank")
    watch = Watch(browser, page.as_uri())
    look_at(browser, *getattr(request, "param", (1400, "light")))
    browser.get(page.as_uri())
    yield browser
    watch.check()


def shown(browser):
    script = """
        return [...document.querySelectorAll(".images li")].filter((i) => i.checkVisibility())
            .map((i) => i.querySelector("span").textContent)
    """
    return browser.execute_script(script)


@pytest.mark.parametrize(
    "opened", [(1400, "light"), (390, "dark")], indirect=True, ids=["desk", "telephone"]
)
def test_the_page_is_complete_and_fits(opened):
    assert opened.title == HOSTILE == opened.find_element(By.TAG_NAME, "h1").text
    images = "return [...document.images].map((i) => [i.complete, i.naturalWidth])"
    seen = opened.execute_script(images)
    assert len(seen) == 13 and all(complete and width for complete, width in seen)
    assert not opened.execute_script("return document.documentElement.scrollWidth > innerWidth")
    assert len(shown(opened)) == 13 and HOSTILE in shown(opened) and "@title@.png" in shown(opened)
    alternative = opened.find_element(By.CSS_SELECTOR, ".picture").get_attribute("alt")
    assert alternative == "what is taken for what"


def test_names_filter(opened):
    field, count = opened.find_element(By.ID, "filter"), opened.find_element(By.ID, "count")
    assert count.text == "13 of 13 images"
    field.send_keys("FOUND/3")
    assert shown(opened) == ["found/3.jpg"] and count.text == "1 of 13 images"
    headings = opened.find_elements(By.CSS_SELECTOR, "section:not([hidden]) h2")
    assert [heading.text for heading in headings] == [HOSTILE]
    field.submit()
    assert shown(opened) == ["found/3.jpg"]
    field.clear()
    field.send_keys("no such name")
    assert shown(opened) == []


def test_errors_filter_by_kind(opened):
    first, second = opened.find_elements(By.CSS_SELECTOR, "button[data-group]")
    first.click()
    assert shown(opened) == [HOSTILE, "@title@.png"]
    second.click()
    assert shown(opened) == ["gone.png"]
    assert [b.get_attribute("aria-pressed") for b in (first, second)] == ["false", "true"]
    second.click()
    assert len(shown(opened)) == 13
