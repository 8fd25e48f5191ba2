"""The built site is complete and self-contained, and its zoo page works."""

from __future__ import annotations

import ast
import json
import zlib
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from site_building import Watch, look_at

from backbones.cli import parity

ROOT = Path(__file__).resolve().parents[2]
# Packages whose modules are described as wholes, and what is shared.
PACKAGES = ("ops/cpu/", "ops/bi_wkv/", "ops/linear_attention/", "ops/neighborhood/")
PACKAGES += ("ops/selective_scan/",)
SHARED = ("ops/fuse/", "ops/rewriting/")


@pytest.fixture
def watch(browser, address):
    return Watch(browser, address)


# Stands for the worker that builds the index of the search, half of the work of opening a page.
_IDLE_WORKER = """
    window.workers = [];
    window.Worker = class extends EventTarget {
        constructor(address) {
            super();
            window.workers.push(new URL(address, location).href);
        }
        postMessage() {}
        terminate() {}
    };
"""


@pytest.fixture
def idle_search(browser):
    """Pages load the index of their search and do not build it."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = browser.execute_cdp_cmd(command, {"source": _IDLE_WORKER})
    yield
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.fixture
def zoo(browser, address, watch, idle_search):
    """The zoo page, freshly loaded and drawn; in the end nothing may have gone wrong."""
    look_at(browser, 1400)
    browser.get(f"{address}/zoo.html")
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, ".js-plotly-plot"))
    yield browser
    watch.check()


def column(browser, heading):
    """What a column sorts by, of the visible rows; None where there is no figure."""
    script = """
        const number = [...document.querySelectorAll("#zoo-table thead th")]
            .findIndex((th) => th.textContent.trim() === arguments[0]);
        return [...document.querySelectorAll("#zoo-table tbody tr")]
            .filter((row) => row.checkVisibility())
            .map((row) => row.cells[number].dataset.key ?? null);
    """
    return browser.execute_script(script, heading)


def data(browser):
    return json.loads(browser.find_element(By.ID, "zoo-data").get_attribute("textContent"))


def points(browser, plot):
    return len(browser.find_elements(By.CSS_SELECTOR, f"#{plot} .scatterlayer .points path"))


@pytest.mark.parametrize("heading", ["Variant", "G MACs", "Reported top-1, %"])
def test_headings_sort(zoo, heading):
    def sorted_keys():
        xpath = f"//table[@id='zoo-table']//button[.='{heading}']"
        zoo.find_element(By.XPATH, xpath).click()
        keys = column(zoo, heading)
        return keys if heading == "Variant" else [key and float(key) for key in keys]

    keys = sorted_keys()
    there = [key for key in keys if key is not None]
    if heading == "Variant":  # whose numbers count as such
        assert (there[0], there[-1]) == ("biformer_base", "vrwkv6_t")
        assert sorted(there) == sorted(name for _, name in parity.variants())
    else:
        assert there == sorted(there) and len(set(there)) > 10
    assert keys[len(there) :] == [None] * (len(keys) - len(there))
    back = sorted_keys()
    assert back[len(there) :] == keys[len(there) :]
    falling = there[::-1] if heading == "Variant" else sorted(there, reverse=True)
    assert back[: len(there)] == falling
    sorted_by = zoo.find_elements(By.CSS_SELECTOR, "#zoo-table th[aria-sort='descending']")
    assert [cell.text.strip().split("\n")[0] for cell in sorted_by] == [heading]


def test_accuracies_have_a_source(site):
    repositories = {f: parity.reference(f, v)["source"] for f, v in parity.variants()}
    del repositories["hat"]
    for family, repository in repositories.items():
        page = (site / "families" / f"{family}.html").read_text()
        address = f"https://github.com/{repository.split('@')[0]}"
        quoted = f'Accuracies are quoted from the paper, or from <a href="{address}'
        assert quoted in page and "https://arxiv.org/abs/" in page, family


def test_filters_rule_table_and_plots(zoo):
    rows = data(zoo)
    plotted = [row for row in rows if row["top1"] is not None and row["plot_macs_g"] is not None]
    assert points(zoo, "zoo-macs") == len(plotted) > 50

    form = zoo.find_element(By.ID, "zoo-filters")
    name = form.find_element(By.NAME, "name")
    name.send_keys("van_b")
    assert column(zoo, "Variant") == [f"van_b{i}" for i in range(7)]
    assert form.find_element(By.ID, "zoo-count").text == f"7 of {len(rows)} variants"
    # Of b5 and b6 no top-1 is published.
    assert points(zoo, "zoo-macs") == 5

    form.find_element(By.NAME, "params").send_keys("20")
    assert column(zoo, "Variant") == ["van_b0", "van_b1"]
    form.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    WebDriverWait(zoo, 10).until(lambda b: len(column(b, "Variant")) == len(rows))

    Select(form.find_element(By.NAME, "family")).select_by_value("shvit")
    assert set(column(zoo, "Family")) == {"shvit"}
    Select(form.find_element(By.NAME, "family")).select_by_value("")
    Select(form.find_element(By.NAME, "licence")).select_by_value("MIT")
    assert set(column(zoo, "Licence")) == {"MIT"}
    Select(form.find_element(By.NAME, "licence")).select_by_value("")
    form.find_element(By.NAME, "pretrained").click()
    expected = [row["name"] for row in rows if row["pretrained"]]
    assert column(zoo, "Variant") == expected and len(expected) < len(rows)


def test_latencies_are_measured_or_a_dash(zoo):
    rows = data(zoo)
    for heading, key in (("CPU, ms", "latency_ms"), ("CPU fused, ms", "fused_ms")):
        shown = [None if cell is None else float(cell) for cell in column(zoo, heading)]
        assert shown == [row[key] for row in rows]
    timed = [row for row in rows if None not in (row["top1"], row["fused_ms"])]
    measured = sum(row["latency_size"] == row["top1_size"] for row in timed)
    assert points(zoo, "zoo-latency") == measured > 50


def test_plots_take_the_colours_of_the_page(zoo):
    """And a click on a point shows its row."""

    def ink():
        title = zoo.find_element(By.CSS_SELECTOR, "#zoo-macs .gtitle")
        return title.value_of_css_property("fill")

    light = ink()
    # Palette by palette, as somebody would click it.
    zoo.find_element(By.CSS_SELECTOR, "form[data-md-component=palette] label:not([hidden])").click()
    WebDriverWait(zoo, 10).until(lambda b: ink() != light)
    click = "emit('plotly_click', { points: [{ customdata: 'van_b6' }] })"
    zoo.execute_script(f"document.getElementById('zoo-macs').{click}")
    assert zoo.find_elements(By.CSS_SELECTOR, "#van_b6.found")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_pages(browser, address, site, watch, idle_search, scheme):
    """Pages open quietly and fit a telephone; one half of them in the light, one in the dark."""
    look_at(browser, 390, scheme)
    # The pages remember the scheme of the last visit.
    browser.get("about:blank")
    storage = {"origin": address, "storageTypes": "local_storage"}
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", storage)
    pages = sorted(page.relative_to(site).as_posix() for page in site.rglob("*.html"))
    assert len(pages) > 25
    (search,) = (path.relative_to(site).as_posix() for path in site.glob("**/workers/search.*.js"))
    seen = """
        return [
            document.body.dataset.mdColorScheme,
            document.documentElement.scrollWidth <= innerWidth,
            [...document.images].filter((i) => i.complete && !i.naturalWidth)
                .map((i) => i.src),
            window.workers,
        ]
    """
    wanted, first = {"light": ("default", 0), "dark": ("slate", 1)}[scheme]
    for page in pages[first::2]:
        if page == "404.html":
            continue
        browser.get(f"{address}/{page}")
        WebDriverWait(browser, 10).until(lambda b: b.execute_script(seen)[0] == wanted, page)
        _, fits, missing, workers = browser.execute_script(seen)
        # The worker is the one that the test of the search runs.
        assert fits and not missing and workers == [f"{address}/{search}"], page
    watch.check()


def test_search_finds_an_op(browser, address, watch):
    look_at(browser, 1400)
    browser.get(f"{address}/index.html")
    browser.find_element(By.CSS_SELECTOR, "input[data-md-component=search-query]").send_keys("na2d")
    results = "[data-md-component=search-result] a"
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, results))
    watch.check()


def test_the_reference_has_every_op(site):
    """Whatever ``__all__`` lists, by the names in Sphinx's format of inventories."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}
    for path in sorted((ROOT / "ops").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        is_package = place.removesuffix("__init__.py") in PACKAGES
        if place.startswith((*SHARED, *PACKAGES)) and not is_package:
            continue
        module = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                public = [name for name in ast.literal_eval(node.value) if not name.isupper()]
                assert {f"{module}.{name}" for name in public} <= known


def test_no_other_markup_remains(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for raw in (":func:", ":class:", ":meth:", ":mod:", ":data:", "=====", "generated: "):
            assert raw not in text, f"{page.name}: {raw}"
