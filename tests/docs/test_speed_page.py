"""The page Speed: a CPU is found, filters rule the table, and losses and gaps are told apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from site_building import look_at


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=["wide", "narrow"])
def speed(
    browser: webdriver.Chrome, address: str, request: pytest.FixtureRequest
) -> webdriver.Chrome:
    look_at(browser, *request.param)
    browser.get_log("browser")
    browser.get(f"{address}/speed.html")
    yield browser
    assert not [entry["message"] for entry in browser.get_log("browser")]


def _data(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    return json.loads(browser.find_element(By.ID, "speed-data").get_attribute("textContent"))


def _form(browser: webdriver.Chrome, name: str) -> Any:
    return browser.find_element(By.ID, "speed-filters").find_element(By.NAME, name)


def _rows(browser: webdriver.Chrome) -> list[list[str]]:
    script = """
        return [...document.querySelectorAll("#speed-table tbody tr")]
            .map((row) => [...row.cells].map((cell) => cell.textContent));
    """
    return browser.execute_script(script)


def _headings(browser: webdriver.Chrome) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#speed-table th button')].map(b => b.textContent)"
    )
    return browser.execute_script(script)


def test_a_cpu_is_found(browser, address):
    browser.get(f"{address}/speed.html")
    field = browser.find_element(By.ID, "cpu-form").find_element(By.NAME, "cpu")
    for words, found in (
        ("AMD EPYC 9654 96-Core", "AMD EPYC 9xx4"),
        ("sierra forest", "Intel Xeon 6"),
    ):
        field.send_keys(words)
        rows = browser.find_elements(By.CSS_SELECTOR, "#cpu-table tbody tr:not([hidden])")
        assert [row.text.startswith(found) for row in rows] == [True], words
        field.clear()
    field.send_keys("no such CPU")
    assert not browser.find_elements(By.CSS_SELECTOR, "#cpu-table tbody tr:not([hidden])")
    assert "doctor" in browser.find_element(By.ID, "cpu-count").text


def test_filters_rule_the_table(speed):
    data = _data(speed)
    usual = [row for row in data if row["batch"] == row["threads"] == 1]
    Select(_form(speed, "cpu")).select_by_value("")
    assert len(_rows(speed)) == len(usual) > 100
    _form(speed, "model").send_keys("van_b")
    assert {row[0].split()[0] for row in _rows(speed)} == {
        row["model"] for row in usual if "van_b" in row["model"]
    }
    _form(speed, "model").clear()
    _form(speed, "losses").click()
    losing = [row for row in usual if any(ratio < 1 for ratio, *_ in row["over"].values())]
    assert len(_rows(speed)) == len(losing) > 0
    red = speed.find_elements(By.CSS_SELECTOR, "#speed-table td.loss")
    assert len(red) >= len(losing) and all(float(cell.text[:-1]) < 1 for cell in red)
    Select(_form(speed, "dtype")).select_by_visible_text("int8")
    assert "Ours, int8, ms" in _headings(speed) and "eager, ms" not in _headings(speed)
    _form(speed, "losses").click()
    assert len(_rows(speed)) == sum(row["cells"]["int8"] is not None for row in usual)
    assert speed.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_not_measured_and_failed_differ(speed):
    for name in ("cpu", "batch", "threads"):
        Select(_form(speed, name)).select_by_value("")
    cells = [cell for row in _data(speed) for cell in row["cells"].values()]
    failed = sum(cell is not None and cell[0] is None for cell in cells)
    for kind, text, count in (("failed", "failed", failed), ("missing", "·", None)):
        cells_of = f"[...document.querySelectorAll('#speed-table td.{kind}')]"
        script = f"return {cells_of}.map((cell) => [cell.textContent, cell.title])"
        found = speed.execute_script(script)
        assert all(shown == text and title for shown, title in found)
        assert len(found) == count or count is None and len(found) > 100


def test_a_heading_sorts(speed):
    for ascending in (True, False):
        speed.find_element(
            By.XPATH, "//table[@id='speed-table']//button[.='Ours, float32, ms']"
        ).click()
        place = _headings(speed).index("Ours, float32, ms")
        shown = [row[place] for row in _rows(speed) if row[place] not in ("·", "failed")]
        times = [float(text.split()[0]) for text in shown]
        assert times == sorted(times, reverse=not ascending) and len(times) > 10
