"""Hostile and damaged files: every command answers with a sentence, none hangs, and no wrong figure goes
unnoticed."""

from __future__ import annotations

import contextlib
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
WRONG = (None, "x", [], {}, -1, 3.5, 1e308, True, {"a": None}, "\x1b[2J[/nope]\u202e\ud800", [[]])
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
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    replaced(path, bytes(raw))


def truncated(path: Path, draw: random.Random, study: Study) -> None:
    raw = path.read_bytes()
    replaced(path, raw[: draw.randrange(len(raw) + 1)])


def not_json(path: Path, draw: random.Random, study: Study) -> None:
    deep = b"[" * 100_000
    nested = b'{"a":' * 500 + b"1" + b"}" * 500
    digits = b'{"steps": ' + b"9" * 5000 + b"}"
    nan = b'{"a": NaN, "b": Infinity, "c": 1e999}'
    replaced(path, draw.choice((deep, nested, digits, nan, b"\xff\xfe\x00", b"\0" * 4096, b"\xef\xbb\xbf{}")))


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
    """One value anywhere in it is missing, hostile text, or of another kind; the checksums are right."""
    value = inside = json.loads(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 3, 4, 6))):
        holder = inside
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        inside = holder[key]
        if not isinstance(inside, dict | list) or not inside:
            break
    if draw.random() < 0.2:
        del holder[key]
    elif isinstance(inside, str):
        holder[key] = inside + ESCAPES
    else:
        holder[key] = draw.choice(WRONG)
    sealed(path, value)


ANY: tuple[Damage, ...] = (flipped, truncated, linked_to_another, a_folder, a_pipe, a_device)
OF_KIND: dict[str, tuple[Damage, ...]] = {  # by the ending of a file's name
    ".json": (*ANY, not_json, *[wrong_kind] * 8),
    ".csv": (*ANY, cells_wrong),
}


def record_again(study: Study, file: str) -> None:
    """The manifest of somebody who rewrites it, too."""
    found = json.loads(study.manifest_file.read_text())
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


def check(study: Study, page: Server, overrides: list[str], expected: dict[str, Any]) -> None:
    """All commands on a damaged study."""
    place = study.root.parent
    for name, *more in READING:
        if answers(study, name, str(study.root), *more, cwd=place) == 0 and name == "verify":
            assert outcome(study) == expected, "verify calls it as recorded"
    visit(page, study)
    answers(study, "diff", str(study.root), str(study.root), cwd=place)
    if answers(study, "autopilot", *overrides, f"output_dir={place}", cwd=place) == 0:
        assert outcome(study) == expected, "autopilot finds nothing wrong"
    answers(study, "report", str(study.root), cwd=place)


@pytest.fixture
def overrides(tiny) -> list[str]:
    return [*tiny, "launcher=inline", "study.name=done"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("EBC_LAB_FUZZ", "500"))))
def test_any_damage_to_any_file_is_answered_by_a_sentence(
    seed, finished, page, overrides, tmp_path, undrawn, alarm
):
    """One file after the other, those that all runs have in a run each time another one."""
    study, draw = linked(finished[1].study, tmp_path), random.Random(seed)
    expected = outcome(study)
    files = [p for p in study.root.iterdir() if p.is_file() and p.suffix not in (".png", ".svg")]
    files += [p for p in study.run_dir(draw.choice(study.run_ids())).iterdir() if p.is_file()]
    path = sorted(files, key=lambda path: path.name)[seed % len(files)]
    damage = draw.choice(OF_KIND.get(path.suffix, ANY))
    damage(path, draw, study)
    try:
        check(study, page, overrides, expected)
    except (Exception, Hung) as error:
        raise AssertionError(f"{path.relative_to(tmp_path)} {damage.__name__}: {error}") from error


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


def a_pipe_while_it_trains(path: Path, draw: random.Random, study: Study) -> None:
    a_pipe(path, draw, study)
    path.with_name("result.json").unlink()
    replaced(path.with_name("progress.json"), b'{"step": 5, "steps": 25, "steps_per_s": 1.0}')


NO_TRACK = {"adam_none": {}}
CASES = [  # file, damage, command, exit code, words
    ("study.json", a_pipe, "status", 2, "not a file but a folder, a pipe or a device"),
    ("study.json", a_device, "verify", 4, "study.json: not a file that can be read"),
    ("study.json", put(b"\xff"), "why", 2, "is damaged"),
    ("study.json", edited(config=[]), "status", 2, "config: expected `object`, got `array`"),
    ("study.json", put("{}"), "status", 2, "delete the file: the study's command writes it again"),
    ("study.json", edited(created="x"), "autopilot", 2, "study.json was changed after it was recorded"),
    ("study.json", recorded_anew(edited(hardware={})), "autopilot", 2, "holds what ebc-lab never writes"),
    ("auto_decisions.json", put(" " * (65 << 20)), "status", 0, "is larger than"),
    ("auto_decisions.json", put('{"lr_sweep": null}'), "why", 2, "expected `object`, got `null`"),
    ("auto_decisions.json", decided(candidates=None), "why", 2, "candidates: expected `array`, got `null`"),
    ("auto_decisions.json", decided(tracks=NO_TRACK), "report", 2, "is not what this stage decides"),
    ("auto_decisions.json", decided(tracks=[]), "why", 2, "tracks: expected `object`, got `array`"),
    ("runs/{run}/result.json", linked_to_another, "status", 0, "was not written by this run"),
    ("runs/{run}/result.json", edited(val_loss="x"), "why --replay", 4, "val_loss: expected `float | null`"),
    ("runs/{run}/result.json", a_folder, "export", 2, "not a file"),
    ("runs/{run}/spec.json", put('{"config": null}'), "status", 0, "config: expected `object`, got `null`"),
    ("runs/{run}/attempts.jsonl", put("null\n[]\n3\n"), "status", 0, ""),
    ("ro-crate-metadata.json", a_pipe, "autopilot", 0, ""),
    ("figures.json", put('[{"name": 3}]'), "autopilot", 2, "figures.json is damaged"),
    (".driver.json", put("[1]"), "status", 0, ""),
    (".command.json", put('{"words": [1], "folder": [], "study": ""}'), "status", 0, ""),
    (".lock", a_pipe, "status", 0, ""),
    ("runs/{run}/evals.csv", a_pipe_while_it_trains, "status", 0, ""),
    ("runs/{run}/progress.json", put('{"step": "x"}'), "status", 0, ""),
]


@pytest.mark.parametrize(("file", "damage", "command", "code", "words"), CASES)
def test_a_damaged_file_is_named_in_a_sentence_and_the_live_page_lives(
    file, damage, command, code, words, finished, page, overrides, tmp_path, undrawn, alarm
):
    study = linked(finished[1].study, tmp_path)
    damage(study.root / file.format(run=a_run(study)), random.Random(0), study)
    visit(page, study)
    name, *more = command.split()
    given = [*overrides, f"output_dir={tmp_path}"] if name == "autopilot" else [str(study.root), *more]
    done = called(name, *given, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert words in " ".join(said.split())
    assert "Traceback" not in said


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
