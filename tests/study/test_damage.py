"""Hostile and damaged files: every command answers with a sentence, none hangs, and no wrong figure goes
unnoticed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.called import called

from ebc_lab.config.errors import HIDDEN
from ebc_lab.records.columns import TIMING_COLUMNS
from ebc_lab.records.json_files import with_checksum
from ebc_lab.report.page.serve import Server, server
from ebc_lab.study.store.study import Study

PATIENCE_S = 60  # for all commands on one study
READING = (["status"], ["why"], ["why", "--replay"], ["verify"], ["export", "-o", "out.zip"])
WRONG = (
    None,
    "x",
    "",
    [],
    {},
    0,
    -1,
    3.5,
    1e308,
    True,
    [None],
    {"a": None},
    "\x1b[2J[/nope]\u202e\ud800",
    [[]],
)
ESCAPES = "\x1b[31m\u202eevil[/nope]\x07\x9b<script>$x_{&"


class Hung(BaseException):
    """A command did not end."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def page(finished) -> Iterator[Server]:
    """One live page for all studies; each test says which one it shows."""
    with server(finished[1].study) as made:
        threading.Thread(target=made.serve_forever, args=[0.01], daemon=True).start()
        yield made
        made.shutdown()


def linked(study: Study, folder: Path) -> Study:
    """A copy of a study that shares the bytes of its files, but those that commands append to."""

    def link(source: str, target: str) -> None:
        growing = source.endswith((".jsonl", ".txt", ".lock"))
        shutil.copy2(source, target) if growing else os.link(source, target)

    shutil.copytree(study.root, folder / "done", copy_function=link)
    return Study(folder / "done")


def replaced(path: Path, content: bytes) -> None:
    """Other bytes in a file of its own: never through a link into the original."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def outcome(study: Study) -> dict[str, Any]:
    """The decisions and tables of a study, without what depends on the time."""
    found: dict[str, Any] = {"decisions": json.loads(study.decisions_file.read_text())}
    for path in sorted(study.root.glob("*.csv")):
        found[path.name] = pd.read_csv(path).drop(columns=list(TIMING_COLUMNS), errors="ignore").to_csv()
    for path in sorted(study.root.glob("*.md")):
        found[path.name] = path.read_text()
    return found


# -- damage --------------------------------------------------------------------------------------------------

Damage = Callable[[Path, random.Random, Study], None]


def flipped(path: Path, draw: random.Random, study: Study) -> None:
    raw = bytearray(path.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 3))):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    replaced(path, bytes(raw))


def truncated(path: Path, draw: random.Random, study: Study) -> None:
    raw = path.read_bytes()
    replaced(path, raw[: draw.randrange(len(raw) + 1)])


def other_json(path: Path, draw: random.Random, study: Study) -> None:
    replaced(path, json.dumps(draw.choice(WRONG)).encode())


def not_json(path: Path, draw: random.Random, study: Study) -> None:
    deep = b"[" * 100_000
    nested = b'{"a":' * 500 + b"1" + b"}" * 500
    digits = b'{"steps": ' + b"9" * 5000 + b"}"
    nan = b'{"a": NaN, "b": Infinity, "c": 1e999}'
    replaced(path, draw.choice((deep, nested, digits, nan, b"\xff\xfe\x00", b"\0" * 4096, b"\xef\xbb\xbf{}")))


def another_runs(path: Path, draw: random.Random, study: Study) -> None:
    others = [p for p in study.runs.glob(f"*/{path.name}") if p.parent.name != path.parent.name]
    content = draw.choice(others).read_bytes() if others else b"{}"
    replaced(path, content)


def linked_to_another(path: Path, draw: random.Random, study: Study) -> None:
    others = [p for p in study.runs.glob(f"*/{path.name}") if p.parent.name != path.parent.name]
    path.unlink()
    path.symlink_to(draw.choice(others) if others else "nowhere")


def a_folder(path: Path, draw: random.Random, study: Study) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path, draw: random.Random, study: Study) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path, draw: random.Random, study: Study) -> None:
    path.unlink()
    path.symlink_to(draw.choice(("/dev/zero", "/dev/tty", path.name)))


def rows_dropped(path: Path, draw: random.Random, study: Study) -> None:
    lines = path.read_bytes().splitlines(keepends=True) or [b""]
    replaced(path, b"".join(line for line in lines if draw.random() < 0.7))


def cells_wrong(path: Path, draw: random.Random, study: Study) -> None:
    cells = path.read_bytes().split(b",")
    cells[draw.randrange(len(cells))] = draw.choice((b"x", b"1e999", b"nan", b'"', b"9" * 5000, b"\0", b"-1"))
    replaced(path, b",".join(cells))


def sealed(path: Path, value: Any) -> None:
    """Written with every checksum that an attacker can compute."""
    if isinstance(value, dict) and path.name == "auto_decisions.json":
        value = {
            k: with_checksum(v, "decision_sha256") if isinstance(v, dict) else v for k, v in value.items()
        }
    elif isinstance(value, dict) and "checksum" in value:
        value = with_checksum(value)
    replaced(path, json.dumps(value).encode())


def wrong_kind(path: Path, draw: random.Random, study: Study) -> None:
    """One value anywhere in it is of another kind, missing, or another number; the checksums are right."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return other_json(path, draw, study)
    value = copy.deepcopy(value)
    holder, key = value, None
    for _ in range(draw.choice((1, 1, 2, 3, 4, 6))):
        inside = holder if key is None else holder[key]
        if not isinstance(inside, dict | list) or not inside:
            break
        holder = inside
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    if key is None:
        return other_json(path, draw, study)
    was = holder[key]
    if draw.random() < 0.2:
        del holder[key]
    elif isinstance(was, str) and draw.random() < 0.5:
        holder[key] = was + ESCAPES
    elif isinstance(was, float) and draw.random() < 0.5:
        holder[key] = was * 0.9
    else:
        holder[key] = draw.choice(WRONG)
    return sealed(path, value)


ANY: tuple[Damage, ...] = (
    flipped,
    truncated,
    another_runs,
    linked_to_another,
    a_folder,
    a_pipe,
    a_device,
)
OF_JSON: tuple[Damage, ...] = (*ANY, other_json, not_json, *[wrong_kind] * 8)
OF_ROWS: tuple[Damage, ...] = (*ANY, rows_dropped, cells_wrong, not_json)
LEFT_BEHIND = {  # files that a study has only at times
    ".driver.json": {"pid": 1, "host": "h", "since": "today"},
    ".command.json": {"words": ["ebc-lab", "autopilot"], "folder": "/", "study": "/"},
    ".launcher.json": {"session": "/nowhere", "name": "ebc-x", "host": "h"},
    ".cancel": {},
    "runs/{run}/progress.json": {"step": 3, "steps": 15, "steps_per_s": 2.0, "at": 1.0},
}


def damage_one(study: Study, draw: random.Random) -> tuple[str, str]:
    """Damage a file of a study. -> which, and how."""
    run = draw.choice(study.run_ids())
    there = sorted(str(p.relative_to(study.root)) for p in study.root.rglob("*") if p.is_file())
    shared = [p for p in there if not p.startswith("runs/") and not p.endswith((".png", ".svg"))]
    own = [p for p in there if p.startswith("runs/")]
    places = [p.format(run=run) for p in LEFT_BEHIND]
    file = draw.choice(draw.choice((shared, own, own, ["auto_decisions.json", "study.json"], places)))
    path = study.root / file
    if file in places:
        content = next(v for k, v in LEFT_BEHIND.items() if k.format(run=run) == file)
        replaced(path, json.dumps(content).encode())
    rows = OF_ROWS if file.endswith((".csv", ".jsonl")) else ANY
    damage = draw.choice(OF_JSON if file.endswith(".json") else rows)
    damage(path, draw, study)
    recorded = damage is wrong_kind and file != "manifest.json" and draw.random() < 0.3
    if recorded:
        record_again(study, file)
    return file, damage.__name__ + (", recorded again" if recorded else "")


def record_again(study: Study, file: str) -> None:
    """The manifest of somebody who rewrites it, too."""
    found = json.loads(study.manifest_file.read_text())
    if file in found["files"]:
        found["files"][file] = hashlib.sha256((study.root / file).read_bytes()).hexdigest()
        sealed(study.manifest_file, found)


# -- the commands --------------------------------------------------------------------------------------------


def answers(study: Study, *arguments: str, cwd: Path) -> int:
    """The exit code of a command that must end with a sentence."""
    done = called(*arguments, cwd=cwd)
    what = f"{' '.join(arguments[:2])}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert done.returncode in (0, 2, 3, 4), what
    assert "Traceback" not in done.stdout + done.stderr, what
    assert not HIDDEN.search(done.stdout + done.stderr), what
    if done.returncode == 2:
        assert done.stderr.startswith("error: "), what
    return done.returncode


def visit(page: Server, study: Study) -> None:
    page.shown = type(page.shown)(study)
    for path in ("/", "/state"):
        connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            found = connection.getresponse()
            body = found.read().decode()
        assert found.status == 200, body
        assert "Traceback" not in body
        assert "<script>$x" not in body


def check(study: Study, page: Server, overrides: list[str], expected: dict[str, Any], honest: bool) -> None:
    """All commands on a damaged study. `honest`: its manifest was not rewritten to match."""
    place = study.root.parent
    trusted = False
    for arguments in READING:
        code = answers(study, *arguments[:1], str(study.root), *arguments[1:], cwd=place)
        trusted = trusted or (arguments == ["verify"] and code == 0)
    (place / "out.zip").unlink(missing_ok=True)
    visit(page, study)
    if trusted and honest:
        assert outcome(study) == expected, "verify calls it as recorded"
    (place / "b").mkdir()
    second = linked(study, place / "b") if not odd(study) else None
    answers(study, "diff", str(study.root), str(study.root), cwd=place)
    code = answers(study, "autopilot", *overrides, f"output_dir={place}", cwd=place)
    if code == 0 and honest:
        assert outcome(study) == expected, "autopilot finds nothing wrong"
    if second is not None:
        answers(second, "report", str(second.root), cwd=place)


def odd(study: Study) -> bool:
    """Whether a copy would read a pipe or a device."""
    return any(not p.is_file() and not p.is_dir() for p in study.root.rglob("*"))


@pytest.fixture
def overrides(tiny) -> list[str]:
    return [*tiny, "launcher=inline", "study.name=done"]


def one_case(seed: int, finished, page, overrides, tmp_path) -> None:
    study = linked(finished[1].study, tmp_path)
    expected = outcome(study)
    file, how = damage_one(study, random.Random(seed))
    try:
        check(study, page, overrides, expected, honest="recorded" not in how)
    except (Exception, Hung) as error:
        raise AssertionError(f"seed {seed}: {file} {how}: {type(error).__name__}: {error}") from error


FUZZ = int(os.environ.get("EBC_LAB_FUZZ", "500"))
FIRST = int(os.environ.get("EBC_LAB_FUZZ_FROM", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + FUZZ))
def test_any_damage_to_any_file_is_answered_by_a_sentence(
    seed, finished, page, overrides, tmp_path, undrawn, alarm
):
    one_case(seed, finished, page, overrides, tmp_path)


# -- a few telling cases of each kind ------------------------------------------------------------------------


def a_run(study: Study) -> str:
    return next(r for r in study.run_ids() if "_n25_s0-" in r)


def put(content: bytes | str) -> Damage:
    return lambda path, draw, study: replaced(path, content.encode() if isinstance(content, str) else content)


def edited(**changes: Any) -> Damage:
    """Some values replaced, and every checksum right."""

    def damage(path: Path, draw: random.Random, study: Study) -> None:
        sealed(path, json.loads(path.read_text()) | changes)

    return damage


def recorded_anew(how: Damage) -> Damage:
    """And the manifest rewritten to match."""

    def damage(path: Path, draw: random.Random, study: Study) -> None:
        how(path, draw, study)
        record_again(study, path.name)

    return damage


def decided(**changes: Any) -> Damage:
    """The same in the decision of the first stage."""

    def damage(path: Path, draw: random.Random, study: Study) -> None:
        found = json.loads(path.read_text())
        found["lr_sweep"] |= changes
        sealed(path, found)

    return damage


def damaged_track(**changes: Any) -> Damage:
    """The same in what it says of its track."""

    def damage(path: Path, draw: random.Random, study: Study) -> None:
        tracks = json.loads(path.read_text())["lr_sweep"]["tracks"]
        decided(tracks={name: track | changes for name, track in tracks.items()})(path, draw, study)

    return damage


NO_TRACK = {"adam_none": {}}
CASES = [  # file, damage, command, exit code, words
    ("study.json", a_pipe, "status", 2, "not a file but a folder, a pipe or a device"),
    ("study.json", a_device, "verify", 4, "study.json: not a file that can be read"),
    ("study.json", put(b"\xff"), "why", 2, "is damaged"),
    ("study.json", edited(config=[]), "status", 2, "config: expected `object`, got `array`"),
    ("study.json", edited(created="x"), "autopilot", 2, "study.json was changed after it was recorded"),
    ("study.json", recorded_anew(edited(hardware={})), "autopilot", 2, "holds what ebc-lab never writes"),
    ("auto_decisions.json", put(" " * (65 << 20)), "status", 0, "is larger than"),
    ("auto_decisions.json", put('{"lr_sweep": null}'), "why", 2, "expected `object`, got `null`"),
    ("auto_decisions.json", decided(candidates=None), "why", 2, "candidates: expected `array`, got `null`"),
    ("auto_decisions.json", damaged_track(ranked=[[]]), "why", 2, "holds what ebc-lab never writes"),
    ("auto_decisions.json", decided(tracks=NO_TRACK), "report", 2, "is not what this stage decides"),
    ("runs/{run}/result.json", linked_to_another, "status", 0, "was not written by this run"),
    ("runs/{run}/result.json", edited(val_loss="x"), "why --replay", 4, "val_loss: expected `float | null`"),
    ("runs/{run}/result.json", a_folder, "export", 2, "not a file"),
    ("runs/{run}/spec.json", put('{"config": null}'), "status", 0, "config: expected `object`, got `null`"),
    ("runs/{run}/attempts.jsonl", put("null\n[]\n3\n"), "status", 0, ""),
    ("figures.json", put('[{"name": 3}]'), "autopilot", 2, "figures.json is damaged"),
    (".driver.json", put("[1]"), "status", 0, ""),
    (".command.json", put('{"words": [1], "folder": [], "study": ""}'), "status", 0, ""),
    (".lock", a_pipe, "status", 0, ""),
    ("runs/{run}/progress.json", put('{"step": "x"}'), "status", 0, ""),
]


@pytest.mark.parametrize(("file", "damage", "command", "code", "words"), CASES)
def test_a_damaged_file_is_named_in_a_sentence(
    file, damage, command, code, words, finished, overrides, tmp_path, undrawn, alarm
):
    study = linked(finished[1].study, tmp_path)
    damage(study.root / file.format(run=a_run(study)), random.Random(0), study)
    name, *more = command.split()
    given = [*overrides, f"output_dir={tmp_path}"] if name == "autopilot" else [str(study.root), *more]
    done = called(name, *given, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert words in " ".join(said.split())
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("study.json", a_pipe),
        ("study.json", edited(config={"launcher": 3})),
        ("auto_decisions.json", decided(tracks=NO_TRACK)),
        ("auto_decisions.json", decided(tracks=[])),
        ("figures.json", put('{"a": 1}')),
        ("runs/{run}/result.json", edited(curve=None, cause=3)),
    ],
)
def test_the_live_page_says_what_is_damaged(file, damage, finished, page, tmp_path, alarm):
    study = linked(finished[1].study, tmp_path)
    damage(study.root / file.format(run=a_run(study)), random.Random(0), study)
    visit(page, study)


def test_nothing_in_a_file_commands_the_terminal_or_the_page(finished, page, tmp_path, undrawn, alarm):
    study = linked(finished[1].study, tmp_path)
    header = json.loads(study.header_file.read_text())
    header["corpus"]["title"] = header["corpus"]["warning"] = ESCAPES
    sealed(study.header_file, header)
    path = study.run_files(a_run(study)).result
    result = json.loads(path.read_text())
    sealed(path, result | {"outcome": "failed", "cause": ESCAPES})
    study.manifest_file.unlink()
    done = called("status", str(study.root), cwd=tmp_path)
    assert r"\x1b[31m\u202eevil[/nope]\x07\x9b<script>" in done.stdout
    assert not HIDDEN.search(done.stdout)
    visit(page, study)


@pytest.mark.parametrize("spoil", [a_pipe, a_folder, put("[]"), put(b"\xff"), edited(hardware=[], config=1)])
def test_a_damaged_neighbour_is_left_out(spoil, finished, overrides, tmp_path, alarm):
    study = linked(finished[1].study, tmp_path)
    shutil.move(study.root, tmp_path / "neighbour")
    path = tmp_path / "neighbour" / "study.json"
    spoil(path, random.Random(0), Study(tmp_path / "neighbour"))
    done = called("plan", *overrides, f"output_dir={tmp_path}", "study.name=other", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["status"], ["verify"], ["export"]])
def test_the_name_of_a_folder_is_text_too(command, finished, tmp_path):
    study = linked(finished[1].study, tmp_path)
    study.root.rename(tmp_path / "a\x1b[2J[red]b")
    done = called(*command, str(tmp_path / "a\x1b[2J[red]b"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"a\x1b[2J[red]b" in done.stdout
    assert not HIDDEN.search(done.stdout)


def test_without_a_name_the_newest_readable_study_is_meant(finished, tmp_path, alarm):
    linked(finished[1].study, tmp_path)
    for name, spoil in (("pipe", os.mkfifo), ("folder", Path.mkdir)):
        (tmp_path / name).mkdir()
        spoil(tmp_path / name / "study.json")
    (tmp_path / "loop").symlink_to("loop")
    done = called("status", "--output-dir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done finished")
