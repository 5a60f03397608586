"""The page of a study under way: it takes up what is new, and leaves the reader where they are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from support.invented import invent

from ebc_lab.records.json_files import write_json
from ebc_lab.report.page.serve import address_of, server
from ebc_lab.study.store.study import Study

pytestmark = pytest.mark.browser


@pytest.fixture
def watched(tmp_path: Path, own_places, text_file: Path):
    """(its address, a function that takes the study so many stages further)"""

    def onwards(stages: int | None) -> Study:
        return invent(
            tmp_path, ["data=path", f"data.file={text_file}", "study.name=under_way"], stages=stages
        )

    study = onwards(1)
    with server(study) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield address_of(made), onwards
        made.shutdown()


def test_it_takes_up_what_is_new_and_leaves_the_reader_in_peace(reader, watched):
    address, onwards = watched
    reader.open(address)
    assert "No answer yet." in reader.one("#verdict").text
    assert reader.one("#live .state").text == "interrupted"
    assert reader.all("#calibrate") == []
    reader.one("#all-settings summary").click()
    header = reader.one("#runs-table thead th:nth-child(7) button")
    reader.show(header)
    header.click()
    reader.one("[data-filter-text]").send_keys("adam")
    reader.one(".arms li:nth-child(2) input").send_keys(Keys.SPACE)
    hidden = reader.one(".arms li:nth-child(2)").text
    reader.one(".zoomer button").click()
    assert reader.all("a[href^='runs/']") == []
    reader.run("window.same = true; document.getElementById('runs').scrollIntoView()")
    where = reader.run("return document.getElementById('runs').getBoundingClientRect().top")
    onwards(2)
    wait = WebDriverWait(reader.driver, 60)
    wait.until(lambda d: d.find_elements("css selector", "#calibrate"))
    wait.until(lambda d: "calibrate" in d.find_element("css selector", "#runs-table").text)
    assert reader.run("return window.same") is True  # not loaded anew
    assert abs(reader.run("return document.getElementById('runs').getBoundingClientRect().top") - where) < 3
    assert reader.one("#all-settings").get_attribute("open") is not None
    assert reader.one("[data-filter-text]").get_attribute("value") == "adam"
    assert reader.one("#runs-table thead th:nth-child(7)").get_attribute("aria-sort") == "ascending"
    assert reader.one("#runs-table thead th:nth-child(1) button")
    assert [row.text for row in reader.all(".arms li:has(input:not(:checked))")] == [hidden]
    assert reader.complaints() == []
    assert {url.rpartition("/")[2] for url in reader.asked_for()} == {"", "state"}
    assert reader.violations() == []


def test_a_run_under_way_shows_how_far_it_is(reader, watched):
    address, onwards = watched
    study = onwards(1)
    run_id = next(p.name for p in sorted(study.runs.iterdir()))
    (study.runs / run_id / "result.json").unlink()
    write_json(study.runs / run_id / "progress.json", {"step": 12, "steps": 60, "steps_per_s": 4.0})
    with study.held():
        reader.open(address)
        assert reader.one("#live .state").text == "running"
        assert reader.one("#live progress").get_attribute("value") == "12"
        assert "12 of 60 steps" in reader.one("#live").text


def test_a_damaged_study_is_said_and_shown_again_once_it_is_mended(reader, watched):
    address, onwards = watched
    study = onwards(1)
    whole = (study.root / "study.json").read_bytes()
    (study.root / "study.json").write_bytes(whole[:100])
    reader.open(address)
    assert "cannot be shown" in reader.one("h1").text
    assert "damaged" in reader.one("main").text
    (study.root / "study.json").write_bytes(whole)
    WebDriverWait(reader.driver, 60).until(lambda d: d.find_elements("css selector", "#runs-table"))
