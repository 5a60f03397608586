"""report.html and its live twin: made of a study's files alone, whatever these say of themselves."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support.called import CLI
from support.invented import invent
from support.recorded import EVIDENCE

import ebc_lab
from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.report.conclude import report
from ebc_lab.report.page import evidence
from ebc_lab.report.page import html as html_module
from ebc_lab.report.page.curves import as_script
from ebc_lab.report.page.serve import LivePage, address_of, server
from ebc_lab.report.text import words as words_module
from ebc_lab.study.resolve import resolve_study
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

HOSTILE = "<script>alert('x')</script> \"quoted\" & more"


def text_of(page: str) -> str:
    """The visible text of a page."""
    bare = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(bare).split())


def read(root: Path) -> str:
    return text_of((root / "report.html").read_text())


def unlucky(spec):
    if spec.role == "control_x8" and spec.run.seed == 0:
        return {"outcome": "diverged", "cause": HOSTILE}
    return {}


@pytest.fixture(scope="module")
def finals(tmp_path_factory, text_file, own_places) -> Path:
    """A finished study of the finals, its pictures left out. Tests must not change it."""
    overrides = ["data=path", f"data.file={text_file}", "study.name=finals", "seeds=[0,1,2]"]
    study = invent(tmp_path_factory.mktemp("finals"), overrides, fate=unlucky, drawn=False)
    html_module.write_page(study.root)
    return study.root


@pytest.fixture
def own(finals, tmp_path) -> Path:
    return shutil.copytree(finals, tmp_path / "finals")


# -- the page ------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_with_target_figure_and_what_could_have_been_seen(finals):
    text = read(finals)
    order = [
        text.rindex(x)
        for x in ("What was checked", "Decisions and", "All runs", "Do it again", "Checksums of the tables")
    ]
    assert order == sorted(order)
    verdict = json.loads((finals / "auto_decisions.json").read_text())["finals"]["tracks"]["adam_none"][
        "verdict"
    ]
    assert len(verdict) == 7
    for line in verdict:
        assert " ".join(line["question"].split()) in text
        assert " ".join(line["figure"].split()) in text
    assert "could have shown" in text[: order[0]]
    assert "What does EBC buy" in text
    assert "Ellipsotope" in text
    [windows, fair, overhead] = evidence.gather(Study(finals))["answers"][0]["tiles"]
    [line] = [line for line in verdict if line["name"] == "best_ebc_no_worse_than_control"]
    d = line["difference"]
    assert (fair.value, fair.unit) == (f"{d['mean']:+.3f}".replace("-", "−"), "nats")
    assert words_module.interval(d["joint_low"], d["joint_high"], 3) in fair.remark
    assert (windows.unit, overhead.value) == ("octaves", "4.2%")
    assert not any(x in text for x in ("Few levels", "Bits per weight", "ms per step", "Low-bit"))
    assert text.index(windows.remark) < text.index(fair.remark) < text.index(overhead.remark) < order[0]


@pytest.mark.thorough
def test_a_suite_that_asks_about_an_own_optimizer_answers_about_it_first():
    recorded = ebc_lab.load(EVIDENCE / "cautious.zip")
    text = text_of(html_module.render(recorded.root, evidence.gather(Study(recorded.root))))
    sentence = recorded.decisions["ablation"]["tracks"]["adam_none"]["answers"]["cautious"]["sentence"]
    said = ("Is cautious better?", "cautious minus this arm", sentence, "Each arm at its own best")
    order = [text.index(x) for x in (*said, "Learning rate and noise", "What was tried")]
    assert order == sorted(order)
    assert "asks about are not trained here" in text
    of_the_default_study = ("a fair control", "natural KL", "headroom", "without EBC", "Ellipsotope")
    assert not any(words in text for words in (*of_the_default_study, "custom", "Best arm"))


def test_every_stage_shows_its_candidates_and_marks_the_one_it_chose(finals):
    html = (finals / "report.html").read_text()
    for stage in ("lr_sweep", "calibrate", "lr_scale"):
        part = html[html.index(f'<article id="{stage}"') :].partition("</article>")[0]
        assert part.count("→ chosen") == 1
        assert "What would have changed it" in part


def test_text_of_the_study_never_becomes_markup(finals):
    html = (finals / "report.html").read_text()
    assert "<script>alert" not in html
    assert re.findall("<script[^>]*>", html) == [
        '<script type="application/json" id="curves-data">',
        "<script>",
        "<script>",
    ]
    assert " ".join(HOSTILE.split()) in read(finals)
    data = {"name": f"</script>{HOSTILE}"}
    assert not set("<>&") & set(as_script(data))
    assert json.loads(as_script(data)) == data


@pytest.mark.parametrize(
    ("arm", "title", "shown"),
    [
        ("ebc", "The loss falls", "ebc: The loss falls"),
        ("ebc", "How ebc limits a step", "How ebc limits a step"),
        ("", "The loss falls", "The loss falls"),
    ],
)
def test_a_picture_of_an_arm_is_named_after_it_once(arm, title, shown):
    drawn = html_module.Picture("loss", "ablation", title, "", arm, Path("loss.svg"))
    assert drawn.whole_title == shown
    assert (drawn.caption, replace(drawn, path=Path("loss.png")).caption) == (title, "")


def test_nothing_but_the_page_itself_may_load_or_run(finals):
    html = (finals / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    sources = re.findall(r'(?:src|action|data)="([^"]+)"', html)
    assert [s for s in sources if not s.startswith("data:")] == []
    leads = re.findall(r'href="([^"]+)"', html)
    assert [lead for lead in leads if not lead.startswith(("#", "data:", "runs/"))] == []


def test_a_run_leads_to_its_log_and_its_curve_where_these_are_there(own):
    runs = sorted((own / "runs").iterdir())
    (runs[0] / "log.txt").write_text("as it ran\n")
    for stream in ("steps.csv", "evals.csv"):
        (runs[1] / stream).unlink()
    html_module.write_page(own)
    html = (own / "report.html").read_text()
    row = {run.name: html[html.index(f'<tr id="run-{run.name}"') :].partition("</tr>")[0] for run in runs[:2]}
    assert re.findall(r'<a href="(runs/[^"]+)">(\w+)</a>', row[runs[0].name]) == [
        (f"runs/{runs[0].name}/log.txt", "log"),
        (f"runs/{runs[0].name}/steps.csv", "steps"),
    ]
    assert '<a href="#curves">curve</a>' in row[runs[0].name]
    assert "href" not in row[runs[1].name]
    assert all((own / lead).is_file() for lead in re.findall(r'href="(runs/[^"]+)"', html))


def test_what_watch_serves_leads_to_no_file_beside_it(finals):
    assert 'href="runs/' not in LivePage(Study(finals)).now()[0].decode()


def test_of_very_many_runs_the_first_are_shown_and_no_link_leads_nowhere(own, monkeypatch):
    monkeypatch.setattr(evidence, "MOST_ROWS", 4)
    study = Study(own)
    with study.blame_files():
        page = html_module.render(own, evidence.gather(study))
    runs = len(study.run_ids())
    assert re.search(rf"the first \d+ of {runs - 1} rows; all are in summary_\*\.csv", page)
    assert "all are in summary_lr_sweep.csv" in page
    ids = set(re.findall(r' id="([^"]+)"', page))
    assert 4 <= sum(name.startswith("run-") for name in ids) < runs - 1
    assert set(re.findall(r'href="#([^"]+)"', page)) <= ids


def test_figures_are_short_enough_to_read(finals):
    html = (finals / "report.html").read_text()
    shown = re.sub(
        r"<(style|script)>.*?</\1>|data-value=\"[^\"]*\"|<code[^>]*>.*?</code>", "", html, flags=re.S
    )
    assert re.findall(r"\d\.\d{7,}", shown) == []
    assert re.findall(r"\b(?:nan|inf|None)\b", shown) == []
    assert re.search(r"<code>seeds</code>.{0,80}\[0, 1, 2\]", html, re.DOTALL)


def test_seeds_that_were_added_are_among_those_of_the_page_and_the_tables(own, undrawn):
    header = read_checksummed(own / "study.json", "")
    header["config"]["seeds"] = [0]  # as if the others had been added at a later look
    write_checksummed(own / "study.json", header)
    assert ("Seeds", "0, 1, 2") in evidence.gather(Study(own))["facts"]
    assert [evidence._seeds(range(3, n)) for n in (11, 12)] == ["3, 4, 5, 6, 7, 8, 9, 10", "9, from 3 to 11"]
    (own / "manifest.json").unlink()  # which recorded another study.json
    report(Study(own))
    assert "seeds 0, 1, 2." in (own / "summary_final.md").read_text()


def test_seeds_that_were_changed_after_an_answer_are_said_beside_the_next_one(own_copy, undrawn):
    config, study = own_copy
    decisions = study.decisions_file.read_text()
    first, said = config.seeds, []
    for seeds in ([*first, 7], [*first, 7, 8]):
        resolve_study(replace(config, seeds=seeds), study, said.append, force=True)
        study.decisions_file.write_text(decisions)  # it has answered again
    n = len(first)
    sentence = f"(done, {n} seeds, {n} of them here, then done, {n + 1} seeds, {n + 1} of them here)"
    assert any(f"{sentence}, so the error of the intervals is divided by 4: 98.75%" in line for line in said)
    resolve_study(config, study, lambda text: None, force=True)  # nor is it forgotten with them
    study.decisions_file.write_text(decisions)
    report(study)
    sentence = "error of the intervals is divided by 8"
    assert sentence in read(study.root)
    assert sentence in (study.root / "summary_final.md").read_text()
    assert ebc_lab.load(study.root).verdict.attrs["looks"] == [n, n + 1, n + 2]


def test_runs_that_diverged_are_told_with_the_command_that_does_them_again(finals):
    text = read(finals)
    part = text[text.rindex("Failures, divergences") :]
    assert "1 run diverged" in part
    again = rf"ebc-lab rerun {finals.name} --run "
    assert re.search(rf"{again}\S+-[0-9a-f]{{10}} ", part)
    assert f"{again}RUN" in part[part.index("All runs") :]  # whose rows have the names


@pytest.mark.thorough
def test_report_rebuilds_the_page_and_verify_knows_it(own_copy, undrawn):
    _, study = own_copy
    names = ["report.html", "acceptance.md", "summary_final.md", "summary_final.tex"]
    before = [(study.root / name).read_bytes() for name in names]
    assert verify(study)["ok"]
    (study.root / "report.html").write_text("an edit")
    assert [bad["file"] for bad in verify(study)["bad"]] == ["report.html"]
    report(study)
    assert [(study.root / name).read_bytes() for name in names] == before
    assert verify(study)["ok"]


@pytest.mark.thorough
def test_a_study_under_way_gets_a_page_of_what_is_decided(tmp_path, text_file):
    study = invent(tmp_path, ["data=path", f"data.file={text_file}"], stages=2)
    report(study)
    text = read(study.root)
    assert all(shown in text for shown in ("No answer yet.", "How large a KL budget", "lr_scale, finals"))


# -- figures -------------------------------------------------------------------------------------------------


def test_listed_figures_are_embedded_in_their_order_as_svg_where_there_is_one(own):
    entry = {"section": "lr_scale", "title": "How far?", "alt": "A line that rises.", "arm": ""}
    hostile = {"section": "finals", "title": 'A <b> "title"', "alt": ""}
    names = {"b": {}, "a": hostile, "../finals/secret": hostile, "gone": hostile}
    listed = [{"name": name, **entry, **changed} for name, changed in names.items()]
    (own / "figures.json").write_text(json.dumps(listed))
    for name in ("b", "a", "secret"):
        (own / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, width in (("b", 9), ("b_phone", 4)):
        (own / f"{name}.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}'/>")
    drawing, photo = html_module.pictures(own)
    assert (drawing.name, drawing.section, drawing.title) == ("b", "lr_scale", "How far?")
    assert (photo.name, photo.section, photo.title) == ("a", "finals", 'A <b> "title"')
    assert drawing.uri.startswith("data:image/svg+xml,")
    assert photo.uri.startswith("data:image/png;base64,")
    html_module.write_page(own)
    html = (own / "report.html").read_text()
    assert 'alt="A line that rises."' in html
    assert "<b>" not in html
    [address] = re.findall('<source media="[^"]*" srcset="([^"]*)">', html)
    assert unquote(address).endswith("svg' width='4'/>")  # the drawing that was made for a phone
    assert " " not in address  # it would end there


def test_of_very_many_figures_those_of_the_judged_arms_stay_and_the_rest_is_named():
    def figure(name: str, arm: str) -> html_module.Picture:
        return html_module.Picture(name, "arms" if arm else "finals", name, name, arm, Path(f"{name}.png"))

    own = [figure("pareto", "")]
    judged = [figure(f"a{k}_loss", f"a{k}") for k in range(3)]
    others = [figure(f"b{k}_loss", f"b{k}") for k in range(100)]
    shown, left = html_module.chosen_pictures(own + others + judged, {"a0", "a1", "a2"})
    assert shown == own + judged
    assert left == others
    assert html_module.chosen_pictures(own + judged, set()) == (own + judged, [])


# -- watch ---------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path, text_file) -> Study:
    return invent(tmp_path, ["data=path", f"data.file={text_file}", "study.name=begun"], stages=1)


@pytest.fixture
def asked(begun):
    """Asks the server of a study under way; -> (status, headers, body)."""
    with server(begun) as made:
        threading.Thread(target=made.serve_forever, args=[0.01], daemon=True).start()
        place = urlsplit(address_of(made)).netloc

        def ask(path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
            connection = http.client.HTTPConnection(place, timeout=60)
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read().decode()
            connection.close()
            return found

        yield ask
        made.shutdown()


@pytest.mark.thorough
def test_watch_serves_the_page_as_it_is_now_and_writes_nothing(begun, asked):
    before = {path: path.stat().st_mtime_ns for path in begun.root.rglob("*")}
    code, headers, body = asked()
    assert code == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert 'id="live"' in body
    assert "interrupted" in body
    _, alone, nothing = asked("/", "HEAD")
    undated = {"Date": ""}  # a second may pass between the two
    assert (alone | undated, nothing) == (headers | undated, "")
    assert {path: path.stat().st_mtime_ns for path in begun.root.rglob("*")} == before


@pytest.mark.thorough
def test_its_version_changes_with_the_files_and_only_then(begun, asked):
    def version() -> str:
        return json.loads(asked("/state")[2])["version"]

    first = version()
    assert version() == first
    run = next(p for p in begun.runs.iterdir())
    (run / "result.json").unlink()
    changed = version()
    assert changed != first
    with begun.held():
        assert version() not in (first, changed)


def test_a_study_of_which_nothing_is_decided_is_shown(tmp_path, text_file):
    study = invent(tmp_path, ["data=path", f"data.file={text_file}"], stages=0)
    text = text_of(LivePage(study).now()[0].decode())
    assert "No answer yet." in text
    assert "0 runs" in text


@pytest.mark.parametrize("name", ["study.json", "auto_decisions.json"])
def test_damage_is_said_in_plain_words(begun, name):
    path = begun.root / name
    path.write_text(path.read_text()[:-40])
    text = text_of(LivePage(begun).now()[0].decode())
    assert str(path) in text
    assert "damaged" in text


@pytest.mark.thorough
def test_an_edited_decision_is_not_shown_as_one(begun):
    path = begun.root / "auto_decisions.json"
    path.write_text(path.read_text().replace('"rule": "', '"rule": "mine: '))
    text = text_of(LivePage(begun).now()[0].decode())
    assert "edited" in text
    assert "mine:" not in text


def test_no_file_no_writing_and_no_other_name_for_this_machine(asked):
    elsewhere = ("/../study.json", "/%2e%2e/begun/study.json")
    for path in ("/study.json", "/report.html", *elsewhere, "/runs", "/x?y"):
        code, _, body = asked(path)
        assert (code, "sha256" in body) == (404, False), path
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert asked("/", method)[0] == 405, method
    for host in ("example.org", "127.0.0.1", "127.0.0.1:1", "example.org:80", ""):
        code, _, body = asked("/", Host=host)
        assert (code, "begun" in body) == (421, False), host


def test_only_this_machine_is_served_and_a_port_that_is_taken_and_a_study_that_is_not_there_are_said(
    begun, tmp_path
):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="is in use: give another --port"):
            server(begun, other.getsockname()[1])
    with server(begun) as made:
        assert made.server_address[0] == "127.0.0.1"
    with pytest.raises(UserError, match="no port"):
        server(begun, 70000)
    with pytest.raises(UserError, match="there is no study"):
        server(Study(tmp_path / "none"))


@pytest.mark.thorough
def test_the_command_says_where_and_ends_with_ctrl_c(begun):
    command = [*CLI, "watch", "begun", "--output-dir", str(begun.root.parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "no longer watching" in out
