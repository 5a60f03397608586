"""report.html as its reader meets it: quiet, whole, and with every control at work."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import statistics
from typing import Any

import pytest
from browser.reader import DESKTOP, HOSTILE, PHONE
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

pytestmark = pytest.mark.browser
NAMES = ("many", "suite", "smoke")
DRAWN_ANEW = ".scripted .static *"  # the pictures that the page's script draws itself
COLUMN = """
const [id, column] = arguments;
return [...document.getElementById(id).tBodies[0].rows].map((row) => {
  const cell = row.cells[column];
  return [cell.classList.contains("number"), cell.dataset.value ?? null, cell.textContent.trim()];
});
"""


TABLES = """
const named = (table) => [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim() !== "");
return [...document.querySelectorAll("table")].map((table) => [table.id, named(table)]);
"""
HEADER = "document.getElementById(arguments[0]).tHead.rows[0].cells"
SHOWN = (
    "return [...document.querySelectorAll('#runs-table tbody tr')].filter((r) => "
    "r.offsetHeight).map((r) => r.textContent.trim())"  # innerText is empty in a table out of view
)
CONTROLS = """
const controls = [...document.querySelectorAll("button, input, select, nav, dialog")];
return controls.filter((e) => e.offsetHeight && !e.closest("th")).map((e) => e.outerHTML);
"""
CUT = """
const cut = (box) => box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
return [...document.querySelectorAll(".table")].filter(cut).map((box) => box.firstElementChild.id);
"""
COPIED = """
const [button, done] = arguments;
const look = () => button.textContent !== "Copy" && done(button.textContent);
new MutationObserver(look).observe(button, { childList: true, characterData: true, subtree: true });
look();
"""


def figure(cell: list) -> float | str | None:
    """What a reader takes a cell for; None: nothing is known."""
    number, value, text = cell
    if value is not None:
        return float(value)
    if not number:
        return None if text in ("", "–") else text
    try:
        return float(text)
    except ValueError:
        return None


def natural(values: list) -> list:
    known = [v for v in values if v is not None]
    assert values[: len(known)] == known, "what is not known stands last"
    return known


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_quiet_asks_the_network_for_nothing_and_shows_text_as_text(reader, studies, name):
    reader.open(studies[name])
    assert reader.complaints() == []
    assert reader.asked_for() == [(studies[name] / "report.html").as_uri()]
    assert "owned" not in reader.title
    assert reader.all("b") == []
    if name == "many":
        assert HOSTILE in reader.one("#broken").text


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere_on_the_page_or_to_a_file_of_the_study(reader, studies, name):
    reader.open(studies[name])
    links = reader.run("return [...document.querySelectorAll('a[href]')].map((a) => a.getAttribute('href'))")
    assert len(links) > 10
    files = [link for link in links if link.startswith("runs/")]
    assert files
    assert all((studies[name] / link).is_file() for link in files)
    links = [link for link in links if link not in files]
    lost = reader.run(
        "return arguments[0].filter((h) => !h.startsWith('#') || !document.getElementById(h.slice(1)))", links
    )
    assert lost == []
    ids = reader.run("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", [pytest.param("many", marks=pytest.mark.slow), "suite", "smoke"])
def test_every_column_sorts_both_ways_by_what_its_cells_mean(reader, studies, name):
    reader.open(studies[name])
    tables = reader.run(TABLES)
    assert len(tables) > 5
    for table, columns in tables:
        for column, named in enumerate(columns):
            if not named:
                continue
            before = reader.run(COLUMN, table, column)
            seen = {}
            for direction in ("ascending", "descending"):
                reader.run(f"{HEADER}[arguments[1]].querySelector('button').click()", table, column)
                sorts = reader.run(f"return [...{HEADER}].map((c) => c.getAttribute('aria-sort'))", table)
                assert sorts == [direction if i == column else None for i in range(len(columns))]
                after = reader.run(COLUMN, table, column)
                assert sorted(map(json.dumps, after)) == sorted(map(json.dumps, before))
                seen[direction] = natural([figure(cell) for cell in after])
            assert seen["ascending"] == seen["descending"][::-1] or len(set(seen["ascending"])) < len(
                seen["ascending"]
            )
            numbers = [v for v in seen["ascending"] if isinstance(v, float)]
            if len(numbers) == len(seen["ascending"]):
                assert numbers == sorted(numbers), (table, column)
                assert seen["descending"] == sorted(numbers, reverse=True), (table, column)


def test_filters_show_the_runs_that_fit_and_say_how_many(reader, studies):
    reader.open(studies["many"])
    total = len(reader.all("#runs-table tbody tr"))
    assert total == 200  # of over 400
    count, find = reader.one("[data-filter-count]"), reader.one("[data-filter-text]")

    def shown() -> list[str]:
        return reader.run(SHOWN)

    assert len(shown()) == total
    Select(reader.one("[data-filter=Outcome]")).select_by_visible_text("diverged")
    assert len(shown()) == 4
    assert count.text == f"4 of {total} runs shown"
    assert all("diverged" in row for row in shown())
    find.send_keys("muon <script>")
    assert len(shown()) == 2
    reader.one("[data-filter-clear]").click()
    assert len(shown()) == total
    Select(reader.one("[data-filter=Stage]")).select_by_visible_text("calibrate")
    assert shown()
    assert all(row.startswith("calibrate") for row in shown())
    find.send_keys("no such run at all")
    assert count.text == f"0 of {total} runs shown"
    reader.run(
        "location.hash = arguments[0]", reader.all("#broken a")[0].get_attribute("href").partition("#")[2]
    )
    assert len(shown()) == total  # whoever follows a link to a run sees it


def assert_focused(reader, button):
    """A dialog tells that it was closed a moment later, and the page gives the focus back then."""
    WebDriverWait(reader.driver, 10).until(lambda d: d.switch_to.active_element == button)


def test_a_figure_enlarges_and_gives_the_focus_back(reader, studies):
    reader.open(studies["smoke"])
    figures = f"figure:not({DRAWN_ANEW})"
    buttons, viewer = reader.all(f"{figures} button"), reader.one("#viewer")
    assert len(buttons) == len(reader.all(figures)) > 3
    assert not viewer.is_displayed()
    buttons[1].send_keys(Keys.ENTER)
    assert viewer.is_displayed()
    large, title = reader.one("#viewer-image"), reader.one("#viewer-title")
    small = reader.all(f"{figures} img")
    assert large.get_attribute("src") == small[1].get_attribute("src")
    assert title.text == reader.all(f"{figures} figcaption")[1].get_attribute("data-title")
    reader.one("[data-step='1']").click()
    assert large.get_attribute("src") == small[2].get_attribute("src")
    reader.one("[data-step='-1']").click()
    viewer.send_keys(Keys.ARROW_LEFT)
    assert large.get_attribute("src") == small[0].get_attribute("src")
    viewer.send_keys(Keys.ARROW_LEFT)  # round the end
    assert large.get_attribute("src") == small[-1].get_attribute("src")
    viewer.send_keys(Keys.ESCAPE)
    assert not viewer.is_displayed()
    assert_focused(reader, buttons[1])
    reader.show(small[0])
    small[0].click()
    assert viewer.is_displayed()
    reader.one("[data-close]").click()
    assert not viewer.is_displayed()
    assert_focused(reader, buttons[0])


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_follows_the_system_and_the_toggle_and_is_remembered(reader, studies, dark):
    def luminance() -> int:
        colour = reader.run("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    reader.open(studies["smoke"], dark=dark)
    assert (luminance() < 200) is dark
    toggle = reader.one("#theme")
    toggle.click()
    assert (luminance() < 200) is not dark
    assert toggle.text == ("Dark" if dark else "Light")
    reader.refresh()
    assert (luminance() < 200) is not dark
    reader.run("localStorage.clear()")


def test_every_command_can_be_copied(reader, studies):
    reader.open(studies["many"])
    boxes = reader.all(".command")
    assert len(boxes) == 6 + len(reader.all(".broken .command"))
    for box in boxes:
        control = box.find_element(By.TAG_NAME, "button")
        reader.show(control)
        control.click()
        assert reader.execute_async_script(COPIED, control) in ("Copied", "Selected")


@pytest.mark.parametrize("size", [PHONE, (390, 844), (768, 1024), DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_the_page_never_scrolls_sideways(reader, studies, name, size):
    reader.open(studies[name], size)
    reader.unfold()
    assert reader.run("return document.documentElement.scrollWidth") <= size[0]
    unreachable = "return [...document.querySelectorAll('.table')].filter((t) => t.tabIndex !== 0).length"
    assert reader.run(unreachable) == 0


SMALL = """return [...document.querySelectorAll('figure.figure img, #viewer-image')]
  .filter((i) => i.offsetHeight && i.width < 0.9 * i.naturalWidth)
  .map((i) => [i.alt, i.width, i.naturalWidth])"""


@pytest.mark.parametrize("name", ["suite", "smoke"])
def test_on_a_phone_a_picture_keeps_the_size_in_which_its_words_can_be_read(reader, studies, name):
    reader.open(studies[name], (390, 844))
    assert reader.run(SMALL) == []
    assert reader.run("return document.documentElement.scrollWidth") <= 390  # it scrolls by itself
    [hero] = reader.all(".hero img")
    assert hero.get_attribute("currentSrc") != hero.get_attribute("src")  # one that is drawn for a phone
    reader.all("figure button")[0].send_keys(Keys.ENTER)
    assert reader.one("#viewer-image").is_displayed()
    assert reader.run(SMALL) == []


FIRST = """return ["#verdict .word", "#verdict .figured", "#verdict .hero img", "#verdict .counts"]
  .map((s) => document.querySelector(s)?.getBoundingClientRect())
  .map((r) => r && [r.left, r.top, r.right, r.bottom].map(Math.round))"""


@pytest.mark.parametrize("name", ["suite", "smoke"])
def test_the_first_screen_has_a_sentence_and_figures_beside_a_picture_on_a_phone_above_it(
    reader, studies, name
):
    reader.open(studies[name], (1400, 900))
    said, figures, picture, counts = reader.run(FIRST)
    for left, top, right, bottom in filter(None, (said, figures, picture, counts)):
        assert 0 <= left < right <= 1400
        assert 0 <= top < bottom <= 900
    assert said[2] <= picture[0] > figures[2]
    assert 1 <= len(reader.all("#verdict .figured dt")) <= 3
    sentence = reader.one("#verdict .word").text
    assert re.fullmatch(r"[^.]+(\.\d[^.]*)*\.", sentence), sentence
    if name == "smoke":  # a fail is never hidden, and one click away
        asked = reader.all("#verdict .check.fail")
        assert (f"{len(asked)} fail" in reader.one("#verdict .counts").text) == bool(asked)
        reader.one("#verdict .counts a").click()
        assert all(check.is_displayed() for check in reader.all("#verdict .check"))
    reader.open(studies[name], (390, 844))
    said, figures, picture, _ = reader.run(FIRST)
    assert said[3] <= figures[1] < figures[3] <= picture[1]


EDGES = """return [...document.querySelectorAll("#verdict .table")].map((box) =>
  [...box.querySelectorAll("tbody tr:nth-child(2) > *")].slice(0, 3).map((cell) =>
    Math.round(cell.getBoundingClientRect().right)))"""


@pytest.mark.parametrize("name", ["suite", "smoke"])
def test_on_a_phone_the_difference_and_the_verdict_are_on_screen(reader, studies, name):
    reader.open(studies[name], (390, 844))
    tables = reader.run(EDGES)
    assert tables
    for edges in tables:
        assert max(edges) <= 390 - 16


AT = "return [...document.querySelectorAll('.arms output')].map((o) => o.textContent)"
LINES = "return document.querySelectorAll('.plot path.line').length"
SPAN = "return [...document.querySelectorAll('.plot text')].map((t) => t.textContent).join()"


def test_loss_curves_are_read_off_by_mouse_and_keyboard(reader, studies):
    reader.open(studies["smoke"])
    plot = reader.one(".plot")
    reader.show(plot)
    data = json.loads(reader.run("return document.getElementById('curves-data').textContent"))
    names = [label.text for label in reader.all(".arms label")]
    arm = next(i for i, a in enumerate(data["arms"]) if (a["stage"], a["name"]) == ("finals", names[0]))
    runs = [run["validation"] for run in data["runs"] if run["arm"] == arm]
    steps = data["steps"][runs[0][0]]

    def median(i: int) -> str:
        return f"{statistics.median(losses[i] for _, losses in runs):.3f}"

    assert reader.run(AT)[0] == median(-1)
    plot.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert f"at step {steps[1]}" in reader.one(".legend .at").text
    assert plot.get_attribute("aria-valuetext") == f"step {steps[1]}"
    assert reader.run(AT)[0] == median(1)
    assert f"{names[0]} {median(1)}" in reader.one(".unseen").get_attribute("textContent")
    reader.run("document.activeElement.blur()")
    x = plot.size["width"] // 2
    ActionChains(reader.driver).move_to_element_with_offset(plot, x - 16, 0).perform()
    assert f"at step {steps[-1]}" in reader.one(".legend .at").text  # the nearest one
    assert len(reader.all(".cursor circle")) <= len(names)
    ActionChains(reader.driver).move_to_element(reader.one("h1")).perform()
    assert "at the end" in reader.one(".legend .at").text


def test_loss_curves_zoom_and_are_filtered_by_arm(reader, studies):
    reader.open(studies["smoke"])
    plot, arms = reader.one(".plot"), reader.all(".arms input")
    reader.show(plot)
    whole = reader.run(SPAN)
    ActionChains(reader.driver).move_to_element_with_offset(plot, -100, 10).click_and_hold().move_by_offset(
        150, 80
    ).release().perform()
    assert reader.run(SPAN) != whole
    [inside, outside, reset] = reader.all(".zoomer button")
    reset.click()
    assert reader.run(SPAN) == whole
    inside.click()
    assert reader.run(SPAN) != whole
    outside.click()
    assert reader.run(SPAN) == whole
    assert reader.run(LINES) == len(arms) > 2
    arms[0].click()
    assert reader.run(LINES) == len(arms) - 1
    [everything, nothing] = reader.all(".every button")
    nothing.click()
    assert reader.run(LINES) == 0
    everything.click()
    assert reader.run(LINES) == len(arms)
    Select(reader.one("[data-curves=stage]")).select_by_visible_text("lr_sweep")
    Select(reader.one("[data-curves=kind]")).select_by_visible_text("training")
    assert reader.run(LINES) > 0
    assert "training loss" in reader.run(SPAN)


@pytest.mark.parametrize("name", ["many", "smoke"])
def test_a_runs_row_leads_to_its_curve(reader, studies, name):
    reader.open(studies[name])
    row = reader.all("#runs-table tbody tr")[-1]
    lead = row.find_element(By.CSS_SELECTOR, "a[href='#curves']")
    lead.send_keys(Keys.ENTER)
    assert row.get_attribute("id").removeprefix("run-") in reader.one(".whose").text
    assert len(reader.all(".plot path.chosen")) == 1
    assert -2 <= reader.run("return document.getElementById('curves').getBoundingClientRect().top") < 200
    reader.one(".whose button").click()
    assert reader.all(".plot path.chosen") == []


DOWNLOADED = """
const [table, done] = arguments;
URL.createObjectURL = (blob) => { window.text = blob.text(); return "#"; };
HTMLAnchorElement.prototype.click = function () { window.text.then((text) => done([this.download, text])); };
const button = document.getElementById(table).closest(".captioned").querySelector("button.csv");
button.click();
"""


def test_every_table_can_be_had_as_csv(reader, studies):
    reader.open(studies["many"])
    assert len(reader.all("button.csv")) == len(reader.all("table"))
    reader.one("[data-filter-text]").send_keys("no such run at all")  # what is filtered is in the file
    name, text = reader.execute_async_script(DOWNLOADED, "runs-table")
    assert name == "many_runs-table.csv"
    assert "\r\n" in text
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(reader.all("#runs-table tbody tr"))
    assert "Files" not in rows[0]
    by_id = {row["Run"]: row for row in rows}
    assert len(by_id) == len(rows)
    for run_id in list(by_id)[:: len(rows) // 5]:
        result = json.loads((studies["many"] / "runs" / run_id / "result.json").read_text())
        if result["outcome"] == "completed":
            assert float(by_id[run_id]["Validation loss"]) == pytest.approx(result["val_loss"], rel=1e-8)
        else:
            assert HOSTILE in by_id[run_id]["Outcome"]
    reader.run("document.querySelector('#settings td').textContent = '=1+1, \"x\"'")
    text = reader.execute_async_script(DOWNLOADED, "settings")[1]
    assert next(csv.reader(io.StringIO(text.split("\r\n", 1)[1])))[1] == '\'=1+1, "x"'


WIDE = """return [...document.querySelectorAll('.table')].filter((t) => t.scrollWidth > t.clientWidth)
  .map((t) => [t.querySelector('table').id, t.offsetHeight - t.clientHeight])"""


@pytest.mark.parametrize("size", [PHONE, (390, 844), (1024, 768), DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_no_table_is_cut_without_a_scrollbar_and_candidates_fit_a_desktop(reader, studies, name, size):
    reader.open(studies[name], size)
    reader.unfold()
    wide = dict(reader.run(WIDE))
    assert all(bar > 6 for bar in wide.values()), wide  # the borders, and a bar that is always there
    if size == DESKTOP:
        assert [table for table in wide if table.endswith("-candidates")] == []


def looks() -> list[Any]:
    """Every study in every size and theme; each pair of these is among those that are not slow."""
    made = []
    for name, size, dark in itertools.product(NAMES, (DESKTOP, PHONE), (False, True)):
        shown = f"{name}-{'phone' if size == PHONE else 'desktop'}-{'dark' if dark else 'light'}"
        paired = (NAMES.index(name) + (size == PHONE) + dark) % 2 == 0
        made.append(pytest.param(name, size, dark, id=shown, marks=() if paired else pytest.mark.slow))
    return made


@pytest.mark.parametrize(("name", "size", "dark"), looks())
def test_axe_finds_nothing(reader, studies, name, size, dark):
    reader.open(studies[name], size, dark=dark)
    reader.unfold()
    assert reader.violations() == []


@pytest.mark.parametrize("name", ["suite", "smoke"])
def test_an_enlarged_figure_is_accessible_too(reader, studies, name):
    reader.open(studies[name])
    reader.all("figure button")[0].send_keys(Keys.ENTER)
    assert reader.violations("#viewer") == []


@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_is_there_without_scripts(reader, studies, name):
    reader.open(studies[name], scripts=False)
    assert reader.all("button#theme") == []
    assert [b for b in reader.all("main button") if b.is_displayed()] == []  # no control that does nothing
    for section in reader.all("main > section"):
        assert section.is_displayed()
        assert len(section.text) > 40
    assert len(reader.all("#runs-table tbody tr")) > 10
    assert all(t.is_displayed() for t in reader.all("table") if t.get_attribute("id") != "settings")
    for fold in reader.all("details:has(figure) > summary"):
        fold.click()
    assert all(f.is_displayed() for f in reader.all("figure.figure"))


@pytest.mark.parametrize("name", NAMES)
def test_paper_shows_everything_and_no_controls(reader, studies, name):
    reader.open(studies[name], (690, 1000), dark=True)
    reader.media("print", dark=True)
    assert reader.run(CONTROLS) == []
    for inside in ("#settings", "#about dl"):  # of details that are closed on the screen
        assert reader.run("return document.querySelector(arguments[0]).checkVisibility()", inside)
    assert reader.run("return document.documentElement.scrollWidth") <= 690
    assert reader.run(CUT) == []
    assert reader.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    if name == "smoke":
        paper = reader.cdp("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})["data"]
        assert len(paper) > 500_000  # with its pictures
    assert all(d.get_attribute("open") is None for d in reader.all("details"))


def test_a_reader_of_the_keyboard_can_skip_to_the_contents(reader, studies):
    reader.open(studies["smoke"])
    reader.one("body").send_keys(Keys.TAB)
    skip = reader.switch_to.active_element
    assert skip.text == "Skip to the contents"
    skip.send_keys(Keys.ENTER)
    assert reader.switch_to.active_element.tag_name == "main"
