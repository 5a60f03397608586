"""Files of other people, changed at random: each is read right, or refused by one sentence.

    python dev/fuzz.py TARGET [--minutes 5] [--seed 0] [--keep fuzz/TARGET] [--more FOLDER] [--again FILE]

Targets: `judge` (all that `ebc-lab judge` reads, and its pandas frames), `bundles` (studies as .zip),
`checkpoints` (states, weights and packed tensors) and `suites` (YAML files, Python files and overrides).
Real inputs are made once, in KEEP/real.pickle: runs in the formats of the tests, a small study that is
trained, the recorded studies. `--more`: a folder with further files for `judge`.

An input is one of those, changed: in its values where its format has some (JSON, tables, protocol buffers,
SQL, tensors), with checksums that fit again, so that what comes behind them is met; else in its bytes. What
is changed and how is read from a string of bytes. Where `atheris` is installed, it changes these bytes
towards lines of ebc_lab that were not reached before; otherwise they are random.

Failures: another exception than the program's own, an exit code above 2, no sentence, a control character or
markup of the input in what is printed or written, a warning of Python's, a file outside the folder, SECONDS
of processor time, GIB of memory, a process that dies. Each is kept in KEEP/NUMBER (the files, `how.json`), at
most KEPT of each place that raises; `--again KEEP/NUMBER/how.json` repeats one. The last lines are a table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}

SECONDS = 30  # of processor time for one input
WALL = 300  # seconds after which a process that answers nothing is ended
GIB = 3  # of memory that an input may ask for
KEPT = 4
READ, REFUSED = "read", "refused by a sentence"
MARKUP = "<script>fuzz</script>"
Tree = dict[str, bytes]


class Wrong(Exception):
    """The program answered, and not as it should."""


class Overdue(BaseException):
    """The time of an input is over."""


# -- choices -------------------------------------------------------------------------------------------------


class Draw:
    """Choices that a string of bytes makes; where it ends, random ones that follow from it."""

    def __init__(self, data: bytes):
        self.data = data
        self.place = 0
        self.rest = random.Random(zlib.crc32(data))

    def below(self, count: int) -> int:
        size = 1 if count <= 256 else 4
        if self.place + size > len(self.data) or count > 1 << 32:
            return self.rest.randrange(count)
        drawn = int.from_bytes(self.data[self.place : self.place + size], "little")
        self.place += size
        return drawn % count

    def of(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]

    def one_in(self, count: int) -> bool:
        return self.below(count) == 0

    def bytes(self, count: int) -> bytes:
        return bytes(self.below(256) for _ in range(count))


# -- changes -------------------------------------------------------------------------------------------------

TEXTS = [
    *("", " ", "x" * 5000, "nan", "NaN", "inf", "-inf", "1e5", "1e999", "-0", "007", "1_000", "1,5", "0x1F"),
    *("True", "null", "None", "NA", "../out", "/", ".", "..", "a/b", "a\\b", "C:x", "~", "$HOME", "${x}"),
    *("${oc.env:HOME}", "\x1b[2J", "a\rb", "a\nb", "a\tb", "\u202eb", "\ufeff", "\x00", "é", "日本", "😀"),
    *(MARKUP, "=1+1", "a,b", 'a"b', "'", "%s", "{}", "{0}", "[", "*", "(", "?", "[red]x[/red]", "[/]", "|"),
    *("`", "_", "<b>", "--x", "-", "@", "#", "2024-01-01", "2024-13-45 99:99", "1970-01-01T00:00:00Z"),
    *("step", "loss", "seed", "arm", "run", "val_loss"),
]
NUMBERS = [
    *(0, 1, -1, 2, 7, 255, 256, 10**6, 10**9, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30),
    *(10**400, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e-30, 1e15, 1e16, 1e30, 1e154, 1e300, 1.7e308),
    *(math.nan, math.inf, -math.inf),
]
TYPES = [
    *("str", "string", "object", "category", "bool", "boolean", "int8", "uint64", "Int64", "float16"),
    *("float32", "Float64", "complex128", "datetime64[ns]", "timedelta64[ns]"),
]
ARMS = ["adam", "muon", "ädam", "日本", "a,b", 'a"b', "a;b", "=1+1", "a b", "1e-3x", "[red]", "x-1", "-", "'"]


def nested(draw: Draw, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if draw.one_in(2) else {"a": value}
    return value


def odd(draw: Draw) -> Any:
    """A value that nobody expects."""
    match draw.below(9):
        case 0 | 1 | 2:
            return draw.of(TEXTS)
        case 3 | 4 | 5:
            return draw.of(NUMBERS)
        case 6:
            return draw.of([None, True, False, [], {}, [None], {"": None}, [[]], [1, "a"], {"a": {"b": [1]}}])
        case 7:
            return nested(draw, draw.of([2, 10, 70, 150]))
        case _:
            return [draw.of(NUMBERS)] * draw.of([1, 3, 1000])


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Each item of nested mappings and lists, as what it is in and its key."""
    found = [] if found is None else found
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found.append((value, key))
        if isinstance(inner, dict | list):
            places(inner, found)
    return found


def changed_value(draw: Draw, value: Any, times: int | None = None) -> Any:
    """A copy of nested values, changed in one or a few places."""
    value = copy.deepcopy(value)
    for _ in range(times or draw.of([1, 1, 1, 2, 4])):
        there = places(value)
        if not there or draw.one_in(60):
            return odd(draw)
        inside, key = there[draw.below(len(there))]
        if draw.one_in(3):  # near the top, where a file has its own words
            inside, key = there[draw.below(min(len(there), 24))]
        match draw.below(10):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, list):
                inside.insert(key, copy.deepcopy(inside[key]))
            case 1 if isinstance(inside, dict):
                inside[str(draw.of(TEXTS))] = inside.pop(key)
            case 2 if isinstance(inside[key], list):
                inside[key] = inside[key][: draw.below(len(inside[key]) + 1)]
            case 3:
                other, name = there[draw.below(len(there))]
                inside[key] = copy.deepcopy(other[name] if name in other or isinstance(other, list) else None)
            case 4 if isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
                number = inside[key]
                inside[key] = draw.of([-number, number + 1, number - 1, float(number), str(number)])
            case 5 if isinstance(inside[key], str):
                inside[key] = changed_text(draw, inside[key])
            case 6:
                inside[key] = [inside[key]]
            case 7 if isinstance(inside, dict):
                inside[draw.of(TEXTS)] = odd(draw)
            case _:
                inside[key] = odd(draw)
    return value


def changed_text(draw: Draw, text: str) -> str:
    at = draw.below(len(text) + 1)
    to = min(len(text), at + draw.of([0, 1, 2, 10]))
    return text[:at] + draw.of(["", draw.of(TEXTS), text[at:to] * 2]) + text[to:]


def changed_bytes(draw: Draw, content: bytes) -> bytes:
    made = bytearray(content)
    for _ in range(draw.of([1, 1, 2, 4, 16])):
        at = draw.below(len(made) + 1)
        to = min(len(made), at + draw.of([1, 1, 2, 4, 8, 64, 1000]))
        match draw.below(8):
            case 0 | 1 if at < len(made):
                made[at] ^= 1 << draw.below(8)
            case 2 if at < len(made):
                made[at] = draw.of([0, 0xFF, 0x7F, 0x80, 10, 32, draw.below(256)])
            case 3:
                del made[at:to]
            case 4:
                made[at:at] = made[at:to]
            case 5:
                made[at:at] = draw.bytes(draw.of([1, 4, 16]))
            case 6:
                del made[at:]
            case _:
                made[at:to] = draw.of([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, draw.of(["little", "big"]))
    return bytes(made)


def changed_lines(draw: Draw, content: bytes) -> bytes:
    """Lines of text left out, doubled, exchanged, or changed in a place; or another encoding."""
    lines = content.decode("utf-8", "replace").splitlines(keepends=True) or [""]
    for _ in range(draw.of([1, 1, 2, 5])):
        at, other = draw.below(len(lines)), draw.below(len(lines))
        match draw.below(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(other, lines[at])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case _:
                lines[at] = changed_text(draw, lines[at])
        lines = lines or [""]
    text = "".join(lines)
    match draw.below(24):
        case 0:
            return text.replace("\n", "\r\n").encode("utf-8", "replace")
        case 1:
            return text.encode(draw.of(["utf-16", "utf-8-sig", "utf-32"]), "replace")
        case 2:
            return text.encode("latin-1", "replace")
    return text.encode("utf-8", "replace")


def changed_table(draw: Draw, content: bytes) -> bytes:
    """A CSV file with other cells, rows or columns, or another way of writing them."""
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8", "replace").replace("\0", "")))) or [[""]]
    except csv.Error:  # another change has left a cell without an end
        return changed_lines(draw, content)
    for _ in range(draw.of([1, 1, 2, 4])):
        row, column = draw.below(len(rows)), draw.below(len(rows[0] or [""]))
        match draw.below(10):
            case 0:
                del rows[row]
            case 1:
                rows.insert(row, rows[draw.below(len(rows))])
            case 2:
                rows = [cells[:column] + cells[column + 1 :] for cells in rows]
            case 3:
                rows = [[*cells, cells[column] if column < len(cells) else ""] for cells in rows]
            case 4:
                rows[0] = [draw.of(TEXTS) if n == column else cell for n, cell in enumerate(rows[0])]
            case 5:
                rows = [rows[0], *sorted(rows[1:], key=lambda _: draw.rest.random())]
            case 6:
                cell = str(odd(draw))
                rows = [rows[0], *([*cells[:column], cell, *cells[column + 1 :]] for cells in rows[1:])]
            case 7:
                rows = rows[: draw.of([1, 2, 3])]
            case _:
                rows[row] = [str(odd(draw)) if n == column else cell for n, cell in enumerate(rows[row])]
        rows = rows or [[""]]
    out = io.StringIO()
    kind = {
        "delimiter": draw.of([",", ",", ",", ";", "\t", "|"]),
        "lineterminator": draw.of(["\n", "\n", "\r\n", "\r"]),
    }
    with contextlib.suppress(csv.Error):
        csv.writer(out, quoting=draw.of([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), **kind).writerows(rows)
    return out.getvalue().encode("utf-8", "replace")


def changed_json(draw: Draw, content: bytes) -> bytes:
    try:
        text = json.dumps(changed_value(draw, json.loads(content)))
    except (ValueError, RecursionError):
        return changed_bytes(draw, content)
    if draw.one_in(40):  # deeper than any writer of Python's
        text = text.replace(
            "1", draw.of(["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]), 1
        )
    return text.encode()


def changed_json_lines(draw: Draw, content: bytes) -> bytes:
    lines = content.splitlines()
    if not lines or draw.one_in(4):
        return changed_lines(draw, content)
    at = draw.below(len(lines))
    lines[at] = changed_json(draw, lines[at])
    return b"\n".join(lines) + b"\n"


def changed_yaml(draw: Draw, content: bytes) -> bytes:
    import yaml

    if draw.one_in(3):
        return changed_lines(draw, content)
    try:
        value = changed_value(draw, yaml.safe_load(content))
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=draw.one_in(2)).encode("utf-8", "replace")
    except (yaml.YAMLError, RecursionError, ValueError):
        return changed_lines(draw, content)


def changed_database(draw: Draw, content: bytes) -> bytes:
    """An SQLite file in which somebody wrote by SQL."""
    with tempfile.NamedTemporaryFile(suffix=".db") as file:
        file.write(content)
        file.flush()
        with (
            contextlib.suppress(sqlite3.Error, OverflowError),
            contextlib.closing(sqlite3.connect(file.name)) as to,
        ):
            tables = [
                n for (n,) in to.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
            ]
            columns_of = {t: [row[1] for row in to.execute(f'PRAGMA table_info("{t}")')] for t in tables}
            for _ in range(draw.of([1, 1, 2, 4]) if tables and all(columns_of.values()) else 0):
                table = draw.of(tables)
                columns = columns_of[table]
                column, value = draw.of(columns), odd(draw)
                value = value if isinstance(value, str | int | float | None) else json.dumps(value)
                some = draw.of(["", "WHERE rowid = (SELECT min(rowid) FROM {})", "WHERE rowid % 2"])
                with contextlib.suppress(sqlite3.Error, OverflowError):
                    match draw.below(8):
                        case 0:
                            to.execute(f'DELETE FROM "{table}" {some.format(table)}')
                        case 1:
                            to.execute(f'DROP TABLE "{table}"')
                        case 2:
                            to.execute(f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO "x"')
                        case _:
                            to.execute(f'UPDATE "{table}" SET "{column}" = ? {some.format(table)}', (value,))
            to.commit()
        return Path(file.name).read_bytes()


def changed_frame(draw: Draw, frame: Any) -> Any:
    """A frame of pandas with other cells, names, types or order."""
    import numpy as np
    import pandas as pd

    frame = frame.copy()
    for _ in range(draw.of([1, 1, 2, 4])):
        if not len(frame.columns):
            break
        at, row = draw.below(len(frame.columns)), draw.below(max(1, len(frame)))
        column = frame.iloc[:, at]
        names = list(frame.columns)
        with contextlib.suppress(
            ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError
        ):
            match draw.below(12):
                case 0 | 1 | 2:
                    cells = list(column)
                    cells[row] = draw.of([odd(draw), pd.NA, pd.NaT, b"x", 1j, (1, 2), np.float16(1)])
                    made = pd.Series([None] * len(cells), index=frame.index, dtype=object)
                    made[:] = cells
                    frame = pd.concat(
                        [frame.iloc[:, :at], made.rename(names[at]), frame.iloc[:, at + 1 :]], axis=1
                    )
                case 3:
                    frame = frame.drop(columns=names[at])
                case 4:
                    names[at] = draw.of(
                        [odd(draw) if draw.one_in(2) else draw.of(TEXTS), names[0], 3, None, ("a", "b")]
                    )
                    frame.columns = pd.Index(names, tupleize_cols=False)
                case 5:
                    kind = draw.of(TYPES)
                    made = column.astype(kind)
                    frame = pd.concat([frame.iloc[:, :at], made, frame.iloc[:, at + 1 :]], axis=1)
                case 6:
                    frame = frame.sample(frac=1, random_state=draw.below(100))
                case 7:
                    frame = pd.concat(
                        [frame, frame.iloc[: draw.below(len(frame) + 1)]], ignore_index=draw.one_in(2)
                    )
                case 8:
                    frame = frame.iloc[: draw.of([0, 1, 2])]
                case 9:
                    frame = frame.set_index(names[at])
                case 10:
                    frame = pd.concat([frame, column.rename(draw.of([*TEXTS, *names]))], axis=1)
                case _:
                    value = draw.of([draw.of(NUMBERS), draw.of(TEXTS)])
                    frame = frame.assign(**{str(names[at]): value})
    return frame


def changed_parquet(draw: Draw, content: bytes) -> bytes:
    import pandas as pd

    if draw.one_in(4):
        return changed_bytes(draw, content)
    out = io.BytesIO()
    try:
        changed_frame(draw, pd.read_parquet(io.BytesIO(content))).to_parquet(out)
    except Exception:  # what pyarrow cannot write is no input
        return changed_bytes(draw, content)
    return out.getvalue()


def changed_wandb(draw: Draw, content: bytes) -> bytes:
    """A log of W&B's with other values in its records, and checksums that fit."""
    if draw.one_in(4):
        return changed_bytes(draw, content)
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2 as protocol

    from ebc_lab.judging.readers.wandb_offline import NotALog, Torn, _records

    with tempfile.NamedTemporaryFile(suffix=".wandb") as file:
        file.write(content)
        file.flush()
        try:
            records = list(_records(Path(file.name)))
        except (NotALog, Torn):  # another change was here
            return changed_bytes(draw, content)
    if not records:
        return changed_bytes(draw, content)
    for _ in range(draw.of([1, 2, 6])):
        at = draw.below(len(records))
        with contextlib.suppress(DecodeError, ValueError, UnicodeEncodeError, AttributeError):
            record = protocol.Record.FromString(records[at])
            items = [
                *record.history.item,
                *record.summary.update,
                *record.run.config.update,
                *record.config.update,
            ]
            if draw.one_in(4) or not items:
                records[at] = draw.of(
                    [changed_bytes(draw, records[at]), records[draw.below(len(records))], b""]
                )
                continue
            item = draw.of(items)
            if draw.one_in(3):
                item.key = draw.of(TEXTS)
            if draw.one_in(4):
                item.nested_key.extend([draw.of(TEXTS), draw.of(["", "loss", "a"])])
            item.value_json = draw.of([json.dumps(odd(draw)), draw.of(TEXTS), "NaN"])
            record.history.step.num = draw.of([record.history.step.num, 0, -1, 2**62])
            records[at] = record.SerializeToString()
    out = bytearray(content[:7])
    for record in records:
        parts, first = record, True
        while first or parts:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += bytes(room)
                continue
            part, parts = parts[: room - 7], parts[room - 7 :]
            kind = (1 if first else 4) if not parts else (2 if first else 3)
            out += struct.pack("<IHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            first = False
    return bytes(out)


def changed_events(draw: Draw, content: bytes) -> bytes:
    """TensorBoard's events with other values in its records, and checksums that fit."""
    if draw.one_in(4):
        return changed_bytes(draw, content)
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    records, at = [], 0
    while at + 12 <= len(content):
        size = struct.unpack("<Q", content[at : at + 8])[0]
        records.append(content[at + 12 : at + 12 + size])
        at += size + 16
    if not records:
        return changed_bytes(draw, content)
    for _ in range(draw.of([1, 2, 6])):
        at = draw.below(len(records))
        with contextlib.suppress(DecodeError, ValueError, OverflowError, UnicodeEncodeError):
            event = Event.FromString(records[at])
            if draw.one_in(3) or not event.summary.value:
                records[at] = draw.of(
                    [changed_bytes(draw, records[at]), records[draw.below(len(records))], b""]
                )
                continue
            event.step = draw.of([event.step, -1, 0, 2**63 - 1])
            event.wall_time = draw.of([event.wall_time, math.nan, math.inf, -1e300, 0.0])
            value = draw.of(event.summary.value)
            match draw.below(5):
                case 0:
                    value.tag = draw.of(TEXTS)
                case 1:
                    value.simple_value = float(draw.of([math.nan, math.inf, -1e30, 1e38]))
                case 2:
                    value.tensor.dtype = draw.below(24)
                case 3:
                    value.tensor.tensor_shape.dim.add().size = draw.of([0, -1, 2, 2**40])
                case _:
                    value.metadata.plugin_data.plugin_name = draw.of(["scalars", "hparams", "text", ""])
                    value.metadata.plugin_data.content = draw.bytes(draw.of([0, 1, 8]))
            records[at] = event.SerializeToString()
    out = b""
    for record in records:
        head = struct.pack("<Q", len(record))
        out += (
            head + struct.pack("<I", masked_crc32c(head)) + record + struct.pack("<I", masked_crc32c(record))
        )
    return out


BY_ENDING: dict[str, Callable[[Draw, bytes], bytes]] = {
    ".csv": changed_table,
    ".tsv": changed_table,
    ".json": changed_json,
    ".jsonl": changed_json_lines,
    ".log": changed_json_lines,
    ".yaml": changed_yaml,
    ".db": changed_database,
    ".parquet": changed_parquet,
    ".wandb": changed_wandb,
    ".py": changed_lines,
    ".txt": changed_lines,
    ".md": changed_lines,
}


def changed_file(draw: Draw, name: str, content: bytes) -> bytes:
    kind = changed_events if ".tfevents." in name else BY_ENDING.get(Path(name).suffix, changed_bytes)
    if draw.one_in(8):
        kind = draw.of([changed_bytes, changed_lines])
    return kind(draw, content)


def changed_tree(draw: Draw, tree: Tree) -> Tree:
    """A folder in which one or a few files are others, gone, doubled or called otherwise."""
    tree = dict(tree)
    for _ in range(draw.of([1, 1, 2, 3])):
        name = draw.of(sorted(tree))
        match draw.below(16):
            case 0 if len(tree) > 1:
                del tree[name]
            case 1:
                tree[draw.of(sorted(tree))] = tree[name]
            case 2:
                tree[str(Path(name).with_name(f"copy-{Path(name).name}"))] = tree[name]
            case _:
                tree[name] = changed_file(draw, name, tree[name])
    return tree


# -- the command line ----------------------------------------------------------------------------------------


def ask(arguments: Sequence[str], folder: Path) -> str:
    """Call the command line in `folder`. -> whether it read or refused. Raises what it should not raise."""
    from support.called import called

    from ebc_lab.config.errors import HIDDEN

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)
        done = called(*arguments, cwd=folder)
    if told:
        where = told[0].filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
        raise Wrong(f"a warning, {where}: {str(told[0].message)[:200]}")
    said = done.stdout + done.stderr
    checks = "verify" in arguments or "--replay" in arguments
    if done.returncode not in (0, 1, 2, *([4] if checks else [])):
        raise Wrong(f"exit code {done.returncode}")
    if "Traceback (most" in said:
        raise Wrong("a traceback is printed")
    if found := HIDDEN.search(said):
        raise Wrong(f"the control character {found[0]!r} is printed")
    if done.returncode == 2:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if len(lines) != 1 or not done.stderr.rstrip().splitlines()[-1].startswith("error: "):
            raise Wrong(f"no sentence, or several: {done.stderr[-300:]!r}")
        if len(lines[0]) > 6000:
            raise Wrong(f"a sentence of {len(lines[0])} characters: {lines[0][:100]}")
        return REFUSED
    if "--json" in arguments:
        json.loads(done.stdout, parse_constant=lambda word: (_ for _ in ()).throw(Wrong(f"{word} in JSON")))
    for page in folder.rglob("*.html"):
        if MARKUP in page.read_text(encoding="utf-8", errors="replace"):
            raise Wrong(f"markup of the input is in {page.name}")
    return READ


def write_tree(tree: Tree, folder: Path) -> None:
    for name, content in tree.items():
        path = folder / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def tree_of(folder: Path) -> Tree:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def module_of_tests(path: str) -> Any:
    """A file of tests, for what it writes."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_text() -> str:
    draw = random.Random(0)
    words = "the cat sat on a mat and saw rain run down to sea under moon".split()  # noqa: SIM905
    return "".join(" ".join(draw.choices(words, k=6)) + ".\n" for _ in range(510))


SMALL = [
    *("scale=smoke", "data=path", "model.blocks=1", "model.width=16", "model.context=16", "batch_size=10"),
    *("budget.probe_sequences=2", "eval_every=10", "eval_windows=8", "device=cpu"),
]
SMALL_STUDY = [
    *("lr_sweep.steps=15", "lr_sweep.grids.adam=[1e-2,2e-2,4e-2]", "lr_sweep.max_extensions=0"),
    *("calibrate.max_extra=1", "finals.steps=25", "launcher=inline", "study.name=done"),
]


def small_study(folder: Path) -> Path:
    """A study that is trained in `folder`, whole."""
    from support.called import answered

    (folder / "words.txt").write_text(small_text())
    given = [*SMALL, "data.file=words.txt", *SMALL_STUDY, f"output_dir={folder / 'outputs'}"]
    answered("autopilot", *given, cwd=folder)
    return folder / "outputs" / "done"


# -- targets -------------------------------------------------------------------------------------------------


class Target:
    """What is attacked. `make` returns real inputs; `attack` reads one of them, changed."""

    def make(self, folder: Path, more: Path | None) -> Any:
        raise NotImplementedError

    def begin(self, real: Any) -> None:
        self.real = real

    def attack(self, draw: Draw, folder: Path) -> str:
        """Write a changed input into `folder` and have it read there. -> READ or REFUSED; else it raises."""
        raise NotImplementedError


class Judge(Target):
    """Runs of other trainers, in every format, and frames of pandas."""

    options = tuple(
        option.split()
        for option in (
            *(
                "--json",
                "--outcome best",
                "--outcome target --target 2.5",
                "--pairs",
                "--distinct",
                "--paired",
            ),
            *("--unpaired", "--margin 0.01", "--sigma pooled", "--sigma 0.1", "--exchange 0.0045/100"),
            *("--rule track3", "--better higher", "--at 200", "--at adam=9", "--chain adam,muon"),
            *("--reference adam", "--loss val_loss", "--arm optimizer", "--seed seed", "--step step"),
            *(
                "--run run",
                "--where seed=0",
                "--setting lr",
                "--lr lr",
                "--planned step",
                "--choose val_loss",
            ),
        )
    )

    def make(self, folder: Path, more: Path | None) -> Any:
        from support.runs_of_others import row_a_run, row_a_step

        made: dict[str, tuple[Tree, list[str]]] = {}

        def add(name: str, argv: Sequence[str] = (".",)) -> Path:
            place = folder / name
            place.mkdir()
            made[name] = ({}, list(argv))
            return place

        frames = {
            "run": row_a_run(),
            "step": row_a_step(),
            "many": row_a_run(arms=("sgd", "adam", "muon", "soap")),
        }
        tuned = row_a_step(seeds=2)
        frames["tuned"] = tuned.assign(lr=[0.1, 0.2, 0.4] * (len(tuned) // 3), stage="final")
        for name, frame in frames.items():
            frame.to_csv(add(f"csv-{name}") / "runs.csv", index=False)
            frame.to_json(add(f"jsonl-{name}") / "runs.jsonl", orient="records", lines=True)
            frame.to_parquet(add(f"parquet-{name}") / "runs.parquet")
        wide = frames["step"].assign(run=frames["step"].optimizer + "-s" + frames["step"].seed.astype(str))
        wide.pivot(index="step", columns="run", values="val_loss").to_csv(add("csv-wide") / "wide.csv")
        wide[:12].to_json(add("json") / "runs.json", orient="records")
        tests = "judging/readers/test_{}.py"
        (add("wandb-csv") / "export.csv").write_text(module_of_tests(tests.format("wandb_csv")).CHART)
        (add("wandb-table") / "export.csv").write_text(
            "Name,State,Created,optimizer,lr,seed,val/loss\nadam-s0,finished,2024-01-01T00:00:00Z,adam,0.1,0,2.5\n"
            "adam-s1,finished,2024-01-01T00:00:01Z,adam,0.1,1,2.6\nmuon-s0,crashed,,muon,0.1,0,2.1\nmuon-s1,,,muon,0.1,1,\n"
        )
        lightning = module_of_tests(tests.format("lightning_logs"))
        lightning.folder.__wrapped__(add("lightning"))
        trainer = module_of_tests(tests.format("trainer_state"))
        trainer.folder.__wrapped__(add("trainer"))
        board, place = module_of_tests(tests.format("tensorboard_events")), add("tensorboard")
        for arm, seed in (("sgd", 0), ("sgd", 1), ("adam", 0), ("adam", 1)):
            values = {"loss__val": lambda step, seed=seed: 1 + step / 4 + seed}
            params = {"lr": 0.5, "opt": arm}
            board.write(place / arm / f"seed{seed}", range(4), new_style=seed == 1, hparams=params, **values)
        hydra, place = module_of_tests(tests.format("hydra")), add("hydra")
        for n, arm in enumerate(["adam", "adam", "muon", "muon"]):
            config = f"optimizer: {{name: {arm}, lr: 0.5}}\nseed: {n % 2}\n"
            hydra.job(
                place / "multirun/2024-05-01/10-11-12" / str(n), [f"optimizer={arm}", f"seed={n % 2}"], config
            )
        pattern = r"step:(?P<step>\d+)/(?P<planned>\d+) val_loss:(?P<loss>[\d.]+|nan)"
        place, text = add("logs", [".", "--pattern", pattern]), module_of_tests(tests.format("logs")).LOG
        for name in ("adam-s0", "adam-s1", "muon-s0", "muon-s1"):
            (place / f"{name}.txt").write_text(text)
        optuna = module_of_tests(tests.format("optuna_storage"))
        optuna.fill(add("optuna-database") / "study.db")
        optuna.fill(add("optuna-journal") / "journal.log")
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        mlflow = module_of_tests(tests.format("mlflow_store"))
        mlflow.fill(f"sqlite:///{add('mlflow-database') / 'mlflow.db'}")
        mlflow.fill(f"file:{add('mlflow-files') / 'mlruns'}")
        place = add("wandb-offline")
        quiet = {
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(place),
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
        }
        script = module_of_tests(tests.format("wandb_offline")).WRITE
        subprocess.run(
            [sys.executable, "-c", script, "40"], check=True, env={**os.environ, **quiet}, cwd=place
        )
        shutil.copytree(small_study(folder), add("study") / "done")
        if more is not None:
            for path in sorted(more.iterdir()):
                shutil.copy(path, add(f"more-{path.name}"))
        trees = {name: (tree_of(folder / name), argv) for name, (_, argv) in made.items()}
        unused = (".lock", ".png", ".svg", "debug.log", "debug-internal.log")
        for tree, _ in trees.values():
            for name in [name for name in tree if name.endswith(unused)]:
                del tree[name]
        return trees, frames

    def attack(self, draw: Draw, folder: Path) -> str:
        match draw.below(8):
            case 0:
                return self._frame(draw, folder)
            case 1:
                return self._right(draw, folder)
        trees, _ = self.real
        tree, argv = trees[draw.of(sorted(trees))]
        write_tree(changed_tree(draw, tree), folder)
        argv = list(argv)
        for _ in range(draw.of([0, 0, 0, 1, 2])):
            argv += draw.of(self.options)
        if draw.one_in(12):
            argv[-1] = draw.of(TEXTS).replace("\0", "") or "x"
        argv += draw.of([["--no-page"]] * 5 + [["-o", "page"]])
        return ask(["judge", *argv], folder)

    def _frame(self, draw: Draw, folder: Path) -> str:
        from ebc_lab import judge
        from ebc_lab.config.errors import UserError

        _, frames = self.real
        frame = changed_frame(draw, frames[draw.of(sorted(frames))])
        with contextlib.suppress(Exception):
            frame.to_pickle(folder / "frame.pickle")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                judgement = judge(frame)
                json.dumps(judgement.record, allow_nan=False)
                _ = judgement.answer, judgement.arms(), judgement.differences()
            except UserError:
                return REFUSED
        return READ

    def _right(self, draw: Draw, folder: Path) -> str:
        """A sound table in one of the formats: arms, counts and means must be those that it has."""
        import pandas as pd

        arms = sorted({draw.of(ARMS) for _ in range(draw.of([2, 3, 4]))})
        scale, seeds = draw.of([1e-3, 1.0, 1e6, 1e12]), draw.of([2, 3, 5])
        rows = [
            (arm, seed, scale * (3 + n + draw.rest.gauss(0, 0.1)) * draw.of([1, 1, 1, -1]))
            for n, arm in enumerate(arms)
            for seed in range(seeds)
        ]
        frame = pd.DataFrame(rows, columns=["arm", "seed", "val_loss"]).sample(
            frac=1, random_state=draw.below(1000)
        )
        if draw.one_in(4):
            frame = frame[["val_loss", "arm", "seed"]]
        if draw.one_in(6):
            frame.loc[draw.of(list(frame.index)), "val_loss"] = math.inf
        match kind := draw.of(["csv", "tsv", "csv", "decimal.csv", "jsonl", "parquet", "csv.gz"]):
            case "parquet":
                frame.to_parquet(folder / "runs.parquet")
            case "jsonl":
                text = "\n".join(json.dumps(row) for row in frame.to_dict("records"))
                (folder / "runs.jsonl").write_text(text)
            case "decimal.csv":
                frame.to_csv(folder / f"runs.{kind}", index=False, sep=";", decimal=",")
            case _:
                line_end = draw.of(["\n", "\r\n"])
                encoding = draw.of(["utf-8", "utf-8-sig"])
                sep = "\t" if kind == "tsv" else ","
                frame.to_csv(
                    folder / f"runs.{kind}", index=False, sep=sep, lineterminator=line_end, encoding=encoding
                )
        from support.called import called

        done = called(
            "judge", ".", "--json", "--arm", "arm", "--seed", "seed", "--loss", "val_loss", cwd=folder
        )
        if done.returncode:
            raise Wrong(f"a sound table is refused: {done.stderr[:200]}")
        found = {one["arm"]: one for one in json.loads(done.stdout)["arms"]}
        if set(found) != set(arms):
            raise Wrong(f"the arms {arms} became {sorted(found)}")
        for arm, own in frame.groupby("arm").val_loss:
            one, mean = found[arm], own.mean()
            same = (
                one["mean"] is None
                if math.isinf(mean)
                else math.isclose(one["mean"], mean, rel_tol=1e-9, abs_tol=1e-300)
            )
            if one["runs"] != len(own) or not same:
                raise Wrong(f"{arm} has {len(own)} runs of mean {mean}, not {one['runs']} of {one['mean']}")
        return READ


class Bundles(Target):
    """Studies as .zip, with manifests and checksums that fit what was changed."""

    commands = tuple(
        command.split()
        for command in (
            *("status", "status --json", "why", "why --json", "why --replay", "verify", "verify --json"),
            *("report", "board", "board --json", "list", "diff", "judge", "plan", "rerun", "load"),
        )
    )

    def make(self, folder: Path, more: Path | None) -> Any:
        from support.called import answered

        study = small_study(folder)
        for name, brief in (("whole", []), ("brief", ["--brief"])):
            answered("export", str(study), "-o", str(folder / f"{name}.zip"), *brief, cwd=folder)
        paths = [folder / "whole.zip", folder / "brief.zip", ROOT / "tests/study/store/made_by_0_2.bundle"]
        paths += [p for p in sorted((ROOT / "docs/evidence").glob("*.zip")) if p.stat().st_size < 200_000]
        return [(path.stem, path.read_bytes(), self._members(path)) for path in paths]

    def _members(self, path: Path) -> Tree:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def attack(self, draw: Draw, folder: Path) -> str:
        # the small ones, of which many can be read, half of the time
        name, whole, members = draw.of(self.real[:3] if draw.one_in(2) else self.real)
        path = folder / f"{name}.zip"
        sealed = False
        if draw.one_in(6):
            path.write_bytes(changed_bytes(draw, whole))
        else:
            sealed = not draw.one_in(6)
            path.write_bytes(self._packed(draw, self._changed(draw, members), sealed))
        command, *options = draw.of(self.commands)
        match command:
            case "board" | "list":
                return ask([command, ".", *options], folder)
            case "diff":
                (folder / "other.zip").write_bytes(whole)
                both = draw.of([[path.name, "other.zip"], ["other.zip", path.name]])
                return ask([command, *both], folder)
            case "judge":
                return ask([command, path.name, "--no-page"], folder)
            case "report":
                return ask([command, path.name, "--output", "page"], folder)
            case "plan":
                return ask([command, f"from={path.name}"], folder)
            case "rerun":  # a run that the file made long is none of our faults
                if any(n.startswith("own/") for n in members) or not draw.one_in(4):
                    return ask(["status", path.name], folder)
                (folder / "words.txt").write_text(small_text())
                try:
                    return ask([command, path.name, "data.file=words.txt", "data=path"], folder)
                except Overdue:
                    return READ
            case "load":
                from ebc_lab.config.errors import UserError
                from ebc_lab.results import load

                try:
                    loaded = load(path)
                    _ = loaded.decisions
                    for table in ("runs", "steps", "evals", "results", "arms", "differences"):
                        getattr(loaded, table)()
                except UserError:
                    return REFUSED
                return READ
        answer = ask([command, path.name, *options], folder)
        if command == "verify" and answer == READ and not sealed:
            self._compare(path, members)
        return answer

    def _compare(self, path: Path, members: Tree) -> None:
        """What verifies has the members of the real one, or is told."""
        from support.called import called

        if called("verify", path.name, cwd=path.parent).returncode == 0 and self._members(path) != members:
            raise Wrong("verify finds nothing, and the members are others")

    def _changed(self, draw: Draw, members: Tree) -> Tree:
        if "runs.jsonl" in members and draw.one_in(2):
            lines = members["runs.jsonl"].splitlines()
            at = draw.below(len(lines))
            run = json.loads(lines[at])
            if draw.one_in(8):
                run = changed_value(draw, run)
            else:
                file = draw.of([key for key in run if key != "run"])
                run[file] = self._sealed(draw, file, run[file].encode()).decode("utf-8", "replace")
            lines[at] = json.dumps(run).encode()
            return members | {"runs.jsonl": b"\n".join(lines) + b"\n"}
        if draw.one_in(5):
            return changed_tree(draw, members)
        # what decides is in these
        told = [
            "study.json",
            "auto_decisions.json",
            "study.json",
            "auto_decisions.json",
            "figures.json",
            *sorted(members),
        ]
        names = [name for name in told if name in members and name != "manifest.json"]
        name = draw.of(names)
        return members | {name: self._sealed(draw, name, members[name])}

    def _sealed(self, draw: Draw, name: str, content: bytes) -> bytes:
        """A file changed in its values, with the checksums in it that fit."""
        from ebc_lab.records.json_files import with_checksum
        from ebc_lab.study.stages.rules import SEAL

        try:
            value = json.loads(content)
        except ValueError:
            return changed_file(draw, name, content)
        changed = changed_value(draw, value)
        with contextlib.suppress(Exception):  # it is what the change made of it
            if name.endswith("auto_decisions.json"):
                changed = {
                    k: with_checksum(v, SEAL) if isinstance(v, dict) else v for k, v in changed.items()
                }
            elif isinstance(value, dict) and "checksum" in value:
                changed = with_checksum(changed)
        return json.dumps(changed).encode()

    def _packed(self, draw: Draw, members: Tree, sealed: bool) -> bytes:
        from ebc_lab.records.json_files import with_checksum

        if sealed and "manifest.json" in members:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                recorded = json.loads(members["manifest.json"])
                files = dict(recorded["files"])
                for name, content in self._unpacked(members).items():
                    if name != "manifest.json":
                        files[name] = hashlib.sha256(content).hexdigest()
                if draw.one_in(12):
                    recorded = changed_value(draw, recorded | {"files": files}, 1)
                else:
                    recorded |= {"files": files}
                members = members | {"manifest.json": json.dumps(with_checksum(recorded)).encode()}
        out = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
            warnings.simplefilter("ignore")
            for name, content in members.items():
                about = zipfile.ZipInfo(name.replace("\0", "") or "x")
                about.compress_type = draw.of([8] * 9 + [0, 12])
                archive.writestr(about, content)
                if draw.one_in(200):
                    archive.writestr(about, content)
        return out.getvalue()

    def _unpacked(self, members: Tree) -> Tree:
        """The files of a study, of which a brief bundle has those of runs in one."""
        files = {name: content for name, content in members.items() if name != "runs.jsonl"}
        for line in members.get("runs.jsonl", b"").splitlines():
            run = json.loads(line)
            files |= {f"runs/{run['run']}/{n}": text.encode() for n, text in run.items() if n != "run"}
        return files


def changed_state(draw: Draw, state: Any) -> Any:
    """A state of tensors, numbers and lists, changed in a few places."""
    import torch

    state = copy.deepcopy(state)
    for _ in range(draw.of([1, 1, 1, 2, 4])):
        there = [pair for pair in places(state) if not isinstance(pair[0], tuple)]
        if not there or draw.one_in(40):
            return odd(draw)
        inside, key = there[draw.below(len(there))]
        value = inside[key]
        if not isinstance(value, torch.Tensor) or value.is_sparse or draw.one_in(4):
            match draw.below(6):
                case 0:
                    del inside[key]
                case 1:
                    inside[key] = torch.zeros(draw.of([(), (0,), (3,), (2, 2)]))
                case 2 if isinstance(value, int | float):
                    inside[key] = draw.of([-value, value + 1, float(value), draw.of(NUMBERS)])
                case 3 if isinstance(inside, dict):
                    inside[draw.of([*TEXTS, 0, 7])] = odd(draw)
                case _:
                    inside[key] = odd(draw)
            continue
        match draw.below(8):
            case 0:
                inside[key] = value.flatten()[: draw.below(value.numel() + 1)].clone()
            case 1:
                inside[key] = value.to(
                    draw.of([torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8])
                )
            case 2 if value.is_floating_point():
                inside[key] = torch.full_like(value, draw.of([math.nan, math.inf, -1.0, 0.0, 1e30]))
            case 3 if value.numel():
                made = value.clone()
                made.view(-1)[draw.below(value.numel())] = draw.of(
                    [0, 1, 255 if value.dtype == torch.uint8 else -1]
                )
                inside[key] = made
            case 4:
                inside[key] = value.unsqueeze(0)
            case 5:
                inside[key] = torch.cat([value, value]) if value.dim() else value.repeat(2)
            case 6:
                inside[key] = value.to(torch.complex64) if draw.one_in(2) else value.to_sparse()
            case _:
                inside[key] = odd(draw)
    return state


class Checkpoints(Target):
    """States of optimizers, weights, packed tensors; what torch.save wrote is changed inside its checksum."""

    def make(self, folder: Path, more: Path | None) -> Any:
        return {name: getattr(self, f"make_{name}")(folder) for name in self.kinds()}

    @classmethod
    def kinds(cls) -> list[str]:
        return [name.removeprefix("make_") for name in vars(cls) if name.startswith("make_")]

    def attack(self, draw: Draw, folder: Path) -> str:
        import torch

        kind = draw.of(self.kinds())
        (folder / "kind.txt").write_text(kind)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(self, f"read_{kind}")(draw, folder, self.real[kind])

    def _state(self, draw: Draw, folder: Path, state: Any) -> Any:
        """A changed state; kept where it may be looked at."""
        import torch

        state = changed_state(draw, state)
        with contextlib.suppress(Exception):
            torch.save(state, folder / "state.pt")
        return state

    @staticmethod
    def _said(call: Callable[[], Any], *kinds: type[Exception]) -> str:
        """Whether a call reads or refuses; a refusal of these kinds needs a sentence."""
        try:
            call()
        except kinds as error:
            if len(str(error)) < 10 or "\n" in str(error).strip():
                raise Wrong(f"no sentence: {error!r}") from error
            return REFUSED
        return READ

    @staticmethod
    def _saved(value: Any) -> bytes:
        import torch

        out = io.BytesIO()
        torch.save(value, out)
        return out.getvalue()

    @staticmethod
    def _loaded(content: bytes) -> Any:
        import torch

        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    # packed tensors

    @staticmethod
    def _layers(levels: str = "ternary") -> Any:
        import torch

        from ebc_lab.lowbit import quantize_model

        torch.manual_seed(0)
        return quantize_model(
            torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)), levels
        )

    def make_packed(self, folder: Path) -> Any:
        from ebc_lab.lowbit.linear import save_packed

        contents = []
        for levels in ("ternary", "five"):
            save_packed(folder / "a.ebcpack", self._layers(levels))
            contents.append((folder / "a.ebcpack").read_bytes())
        return contents

    def read_packed(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.lowbit.container import DamagedFileError, inspect_packed, read_packed, write_packed
        from ebc_lab.lowbit.linear import load_packed

        whole = draw.of(real)
        sealed = not draw.one_in(4)
        if sealed:
            length = struct.unpack("<Q", whole[8:16])[0]
            header, payload = whole[16 : 16 + length], whole[16 + length : -32]
            if draw.one_in(4):
                payload = changed_bytes(draw, payload)
            else:
                header = json.dumps(
                    changed_value(draw, json.loads(header)), sort_keys=True, separators=(",", ":")
                ).encode()
            content = whole[:8] + struct.pack("<Q", len(header)) + header + payload
            content += hashlib.sha256(content).digest()
        else:
            content = changed_bytes(draw, whole)
        path = folder / "a.ebcpack"
        path.write_bytes(content)

        def read() -> None:
            inspect_packed(path)
            tensors = read_packed(path)
            if content != whole and not sealed:
                raise Wrong("it is another file, and is read")
            write_packed(folder / "again.ebcpack", tensors)
            again = read_packed(folder / "again.ebcpack")
            parts = [
                [
                    (n, t.shape, *(p.tobytes() for p in ((t.data, t.steps) if hasattr(t, "steps") else (t,))))
                    for n, t in read.items()
                ]
                for read in (tensors, again)
            ]
            if parts[0] != parts[1]:
                raise Wrong("it is read, and written again it is another one")

        answer = self._said(read, DamagedFileError)
        return max(answer, self._said(lambda: load_packed(path, self._layers()), ValueError))

    # the trainer of few levels

    def _low_bit_trainer(self) -> Any:
        from ebc_lab.lowbit import HybridLLMTrainer, TrainingConfig

        settings = TrainingConfig(max_epochs=2, batch_size=16, hidden=12, n_clusters=2, use_adaptive_lr=True)
        return HybridLLMTrainer(settings), module_of_tests("lowbit/test_trainer.py").low_rank(40, 6)

    def make_low_bit_trainer(self, folder: Path) -> Any:
        trainer, rows = self._low_bit_trainer()
        trainer.train(rows)
        trainer.save_checkpoint(folder / "a.ebctrain")
        return (folder / "a.ebctrain").read_bytes()

    def read_low_bit_trainer(self, draw: Draw, folder: Path, real: bytes) -> str:
        from ebc_lab.lowbit.trainer.run import _MAGIC

        body = real[len(_MAGIC) + 32 :]
        inner = (
            self._saved(changed_state(draw, self._loaded(body)))
            if draw.one_in(2)
            else changed_bytes(draw, body)
        )
        content = _MAGIC + hashlib.sha256(inner).digest() + inner
        path = folder / "a.ebctrain"
        path.write_bytes(content if not draw.one_in(5) else changed_bytes(draw, real))
        trainer, rows = self._low_bit_trainer()

        def read() -> None:
            trainer.load_checkpoint(path)
            trainer.train(rows)

        return self._said(read, ValueError)

    # AXIOM

    def make_axiom_trainer(self, folder: Path) -> bytes:
        from axiom.trainer_helpers import batches, quiet, tiny

        trainer = quiet(tiny(), batches(), batches())
        trainer.fit(3)
        return trainer.save_checkpoint(path=folder / "axiom.pt").read_bytes()

    def read_axiom_trainer(self, draw: Draw, folder: Path, real: bytes) -> str:
        from axiom.trainer_helpers import batches, quiet, tiny

        from ebc_lab.axiom.trainer_files import header

        body = real.split(b"\n", 1)[1]
        body = (
            self._saved(changed_state(draw, self._loaded(body)))
            if draw.one_in(2)
            else changed_bytes(draw, body)
        )
        path = folder / "axiom.pt"
        path.write_bytes(header(hashlib.sha256(body).hexdigest()) + body)
        trainer = quiet(tiny(), batches(), batches())

        def read() -> None:
            trainer.load_checkpoint(path)
            trainer.fit(1)

        return self._said(read, ValueError, FloatingPointError)

    def make_axiom_payload(self, folder: Path) -> Any:
        from ebc_lab.axiom.packing import AXIOM_CHECKPOINT

        return AXIOM_CHECKPOINT(seed=3).state_dict()

    def read_axiom_payload(self, draw: Draw, folder: Path, real: Any) -> str:
        import torch

        from ebc_lab.axiom.packing import AXIOM_CHECKPOINT

        state, slots = self._state(draw, folder, real), AXIOM_CHECKPOINT()

        def read() -> None:
            slots.load_state_dict(state)
            slots.store(torch.ones(100), 0)
            slots.restore(0)

        return self._said(read, ValueError)

    def make_axiom_workers(self, folder: Path) -> Any:
        import torch

        return {"residuals": [[torch.zeros(4, 3), torch.zeros(4)]], "sent": 3, "dense": 5}

    def read_axiom_workers(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.axiom.distributed import AxiomDDPState

        state = self._state(draw, folder, real)
        return self._said(lambda: AxiomDDPState().load_state_dict(state), ValueError)

    # EBC on an optimizer

    @staticmethod
    def _attached(budget: str) -> Any:
        import torch
        from support.tokenwise import Tokenwise

        from ebc_lab.ebc import attach

        torch.manual_seed(0)
        model = Tokenwise(width=16)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, optimizer, attach(model, optimizer, target_kl=0.005, budget=budget, probe_sequences=2)

    def make_ebc(self, folder: Path) -> Any:
        states = {}
        for budget in ("surrogate", "tracked", "shadow", "fisher"):
            model, optimizer, _ = self._attached(budget)
            train_attached(model, optimizer, 4)
            states[budget] = copy.deepcopy(optimizer.state_dict())
        return states

    def read_ebc(self, draw: Draw, folder: Path, real: Any) -> str:
        budget = draw.of(sorted(real))
        model, optimizer, ebc = self._attached(budget)
        state = self._state(draw, folder, real[budget]["ebc"])
        (folder / "kind.txt").write_text(f"ebc {budget}")

        def read() -> None:
            if draw.one_in(2):
                ebc.load_state_dict(state)
            else:
                optimizer.load_state_dict({**real[budget], "ebc": state})
            train_attached(model, optimizer, 2)

        return self._said(read, ValueError)

    # a run's checkpoint.pt and weights.pt

    VARIANTS = (
        ("adam", "budget=surrogate"),
        ("muon", "budget=shadow"),
        ("adam", "budget=tracked"),
        ("schedule_free", "projection=stiefel"),
        ("adam", "controller=confidence"),
        ("soap", "stabilizer=zclip"),
    )

    @staticmethod
    def _run(folder: Path, optimizer: str, other: str) -> Any:
        from support.runs import resolved

        from ebc_lab.config.compose import compose
        from ebc_lab.config.dicts import run_part

        text = folder / "words.txt"
        text.write_text(small_text())
        given = [
            *SMALL,
            f"data.file={text}",
            "optimizer.lr=1e-2",
            "steps=12",
            f"optimizer={optimizer}",
            other,
        ]
        return resolved(run_part(compose(given, study=False)))

    def make_run(self, folder: Path) -> Any:
        from ebc_lab.training.run import Training

        kept = {}
        for variant in self.VARIANTS:
            place = folder / "-".join(variant)
            place.mkdir()
            training = Training(self._run(folder, *variant), place)
            training.advance(6)
            training.save_checkpoint()
            training.recording.close()
            kept[variant] = tree_of(place)
        return kept

    def read_run(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.config.errors import UserError
        from ebc_lab.records.weights import seal, unseal
        from ebc_lab.training.run import Training

        variant = draw.of(self.VARIANTS)
        tree = dict(real[variant])
        name = next(name for name in tree if name.endswith("checkpoint.pt"))
        about, body = unseal(tree[name], ["checkpoint"])
        if draw.one_in(6):
            tree = changed_tree(draw, tree)
        elif draw.one_in(8):
            tree[name] = seal("checkpoint", changed_value(draw, about), body)
        else:
            inner = (
                changed_bytes(draw, body)
                if draw.one_in(5)
                else self._saved(changed_state(draw, self._loaded(body)))
            )
            tree[name] = seal("checkpoint", about, inner)
        write_tree(tree, folder)
        run = self._run(folder, *variant)

        def read() -> None:
            training = Training(run, folder)
            try:
                training.advance(2)
            except Exception as error:
                if not any(frame.name == "take_step" for frame in traceback.extract_tb(error.__traceback__)):
                    raise  # what torch's own optimizers make of a state that they took is theirs
            training.recording.close()

        return self._said(read, UserError, FloatingPointError)

    def make_weights(self, folder: Path) -> Any:
        from ebc_lab.config.choices import changed
        from ebc_lab.training.outcome import run_and_record

        run = changed(self._run(folder, "adam", "stabilizer=none"), {"init": {"keep": True}})
        run_and_record(run, folder / "kept", "x")
        return (folder / "kept" / "weights.pt").read_bytes()

    def read_weights(self, draw: Draw, folder: Path, real: bytes) -> str:
        from ebc_lab.records.weights import seal, unseal

        about, body = unseal(real)
        match draw.below(4):
            case 0:
                content = changed_bytes(draw, real)
            case 1:
                content = seal("weights", changed_value(draw, about), body)
            case 2:
                content = seal("weights", about, changed_bytes(draw, body))
            case _:
                content = seal("weights", about, self._saved(changed_state(draw, self._loaded(body))))
        (folder / "weights.pt").write_bytes(content)
        (folder / "words.txt").write_text(small_text())
        given = [
            *SMALL,
            "data.file=words.txt",
            "steps=2",
            "stabilizer=none",
            "optimizer.lr=1e-2",
            "init.run=weights.pt",
        ]
        return ask(["train", *given, "output_dir=out"], folder)

    # the energy-based model

    def make_ebm(self, folder: Path) -> bytes:
        from support.ebm_runs import eventful, tiny_ebm

        from ebc_lab.training.run import Training

        (folder / "ebm.txt").write_text(small_text())
        (folder / "ebm").mkdir()
        training = Training(eventful(tiny_ebm(folder / "ebm.txt")), folder / "ebm")
        training.advance(4)
        training.recording.close()
        training.workload.finished(training.model, training.step, training.files)
        return training.files.model.read_bytes()

    def read_ebm(self, draw: Draw, folder: Path, real: bytes) -> str:
        whole = self._loaded(real)
        if draw.one_in(5):
            content = changed_bytes(draw, real)
        else:
            if draw.one_in(3):
                whole["run"] = json.dumps(changed_value(draw, json.loads(whole["run"])))
            else:
                whole = changed_state(draw, whole)
            content = self._saved(whole)
        (folder / "model.pt").write_bytes(content)
        (folder / "ebm.txt").write_text(small_text())
        command = draw.of(
            [["diagnose", "model.pt"], ["generate", "model.pt", "--prompt", "the cat", "--tokens", "3"]]
        )
        return ask(["ebm", *command], folder)

    # exact training

    def make_verity(self, folder: Path) -> Any:
        _, grids, optimizer = self._exact()
        return {"grids": grids.state_dict(), "optimizer": optimizer.state_dict()}

    @staticmethod
    def _exact() -> Any:
        import torch

        from ebc_lab.verity import ops
        from ebc_lab.verity.grids import Grids
        from ebc_lab.verity.optim import VerityAdam

        torch.manual_seed(0)
        layer = ops.VLALinear(3, 2)
        grids, optimizer = Grids(layer), VerityAdam(layer.parameters(), lr=0.01)
        exact_step(layer, grids, optimizer)
        return layer, grids, optimizer

    def read_verity(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.verity.bits import VerityError

        layer, grids, optimizer = self._exact()
        part = draw.of(["grids", "optimizer"])
        state = self._state(draw, folder, real[part])
        (folder / "kind.txt").write_text(f"verity {part}")

        def read() -> None:
            (grids if part == "grids" else optimizer).load_state_dict(state)
            exact_step(layer, grids, optimizer)

        return self._said(read, VerityError, ValueError)

    # what few levels keep

    def make_low_bit_state(self, folder: Path) -> Any:
        return {kind: part.state_dict() for kind, part in self._low_bit_parts().items()}

    @staticmethod
    def _low_bit_parts() -> Any:
        import torch

        from ebc_lab.lowbit.gradients import GradientQuantizer
        from ebc_lab.lowbit.policy import AuxiliaryNetwork

        quantizer = GradientQuantizer("five", error_feedback=True)
        quantizer.compress([torch.ones(3, 2), torch.ones(4, 4)], 0)
        quantizer.commit()
        return {"policy": AuxiliaryNetwork(0), "gradients": quantizer}

    def read_low_bit_state(self, draw: Draw, folder: Path, real: Any) -> str:
        import torch

        kind = draw.of(sorted(real))
        part, state = self._low_bit_parts()[kind], self._state(draw, folder, real[kind])
        (folder / "kind.txt").write_text(f"low bit {kind}")

        def read() -> None:
            part.load_state_dict(state)
            if kind == "policy":
                part.predict([0.1] * 6)
            else:
                part.compress([torch.ones(3, 2), torch.ones(4, 4)], 1)

        return self._said(read, ValueError)


def train_attached(model: Any, optimizer: Any, steps: int) -> None:
    """Some steps of a model of the tests, on tokens that are always the same."""
    import torch

    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(8, (6, 9), generator=draw)
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def exact_step(layer: Any, grids: Any, optimizer: Any) -> None:
    """One step of a layer on four tokens; what does not fit its grid is repeated once."""
    import torch

    for _ in range(2):
        layer(torch.ones(4, 3)).backward(torch.ones(4, 2))
        if grids.finish(4):
            optimizer.step()
            return


class Suites(Target):
    """Suites and choices in YAML, optimizers in Python, and overrides."""

    def make(self, folder: Path, more: Path | None) -> Any:
        from support.called import answered

        answered("new", "cautious", cwd=folder)
        starter = tree_of(folder)
        own = {
            f"{path.stem}.yaml": path.read_bytes() for path in sorted((ROOT / "conf/study").glob("*.yaml"))
        }
        own |= {path.name: path.read_bytes() for path in sorted((ROOT / "docs/evidence").glob("*.yaml"))}
        parts = {
            f"{group}/{path.name}": path.read_bytes()
            for group in (
                "optimizer",
                "budget",
                "scale",
                "launcher",
                "stabilizer",
                "lr_schedule",
                "model",
                "target",
            )
            for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
        }
        code = {path.name: path.read_bytes() for path in sorted((ROOT / "docs/evidence").glob("*.py"))}
        from ebc_lab.config.overrides import schema_keys

        return starter, own, parts, code, sorted(schema_keys())

    def attack(self, draw: Draw, folder: Path) -> str:
        starter, suites, parts, code, keys = self.real
        given = ["data=path", "data.file=words.txt"]
        (folder / "words.txt").write_text("the cat sat on a mat. " * 400)
        match draw.below(8):
            case 0 | 1 | 2:
                name = draw.of(sorted(suites))
                (folder / name).write_bytes(changed_yaml(draw, suites[name]))
                write_tree(code, folder)
                given += [f"study=./{name}", "scale=smoke"]
            case 3 | 4:
                write_tree(changed_tree(draw, starter), folder)
                given += ["study=./cautious.yaml", "scale=smoke"]
            case 5:
                name = draw.of(sorted(parts))
                group, _, file = name.partition("/")
                (folder / file).write_bytes(changed_yaml(draw, parts[name]))
                given += [f"{group}=./{file}"]
            case 6:
                name = draw.of(sorted(parts))
                write_tree({f"conf/{Path(name).parent}/mine.yaml": changed_yaml(draw, parts[name])}, folder)
                given += [f"{Path(name).parent}=mine"]
            case _:
                given += ["scale=smoke"]
        for _ in range(draw.of([0, 1, 3])):
            value = odd(draw)
            written = value if isinstance(value, str) else json.dumps(value)
            given.append(f"{draw.of(keys)}={written}".replace("\0", ""))
            if draw.one_in(6):
                given[-1] = changed_text(draw, given[-1]).replace("\0", "")
        command = draw.of([["plan"]] * 6 + [["plan", "--json"]])
        given = [one for one in given if not one.startswith("-")]
        (folder / "arguments.json").write_text(json.dumps([*command, *given]))
        return ask([*command, *given], folder)


TARGETS: dict[str, type[Target]] = {
    "judge": Judge,
    "bundles": Bundles,
    "checkpoints": Checkpoints,
    "suites": Suites,
}

# -- one process that tries ----------------------------------------------------------------------------------


def overdue(number: int, frame: Any) -> None:
    raise Overdue


def shortest(error: BaseException) -> tuple[str, str]:
    """Where an error was raised, the innermost line of ours; and what it says."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/ebc_lab/" in f.filename]
    if isinstance(error, Wrong):
        return " ".join(str(error).split()[:6]), str(error)
    inner = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
    place = inner.filename.rpartition("/ebc_lab/")[2] or inner.filename
    return (
        f"{place}:{inner.name} {type(error).__name__}",
        f"{place}:{inner.lineno} {type(error).__name__}: {error}"[:400],
    )


class Trying:
    """A process that tries inputs until its time is over, and notes what became of each."""

    def __init__(self, name: str, keep: Path):
        self.target = TARGETS[name]()
        self.keep = keep
        with open(keep / "real.pickle", "rb") as file:
            self.target.begin(pickle.load(file))
        self.outer = Path(tempfile.mkdtemp(prefix="fuzz-"))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (GIB << 30), resource.RLIM_INFINITY))
        signal.signal(signal.SIGPROF, overdue)

    def one(self, data: bytes) -> None:
        """Try the input that these bytes make, and note the outcome."""
        (self.keep / "current").write_bytes(data)
        place = self.outer / "sandbox" / "in"
        shutil.rmtree(self.outer, ignore_errors=True)
        place.mkdir(parents=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            try:
                outcome = self.target.attack(Draw(data), place)
                if outside := [
                    p.name
                    for p in (self.outer, place.parent)
                    for p in p.iterdir()
                    if p.name not in ("sandbox", "in")
                ]:
                    raise Wrong(f"{outside[0]} was written outside the folder")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            outcome = note_failure(self.keep, data, place, *shortest(error), traceback.format_exc())
        with open(self.keep / "outcomes", "a") as file:
            file.write(f"{outcome}\n")


def note_failure(keep: Path, data: bytes, place: Path | None, group: str, line: str, whole: str) -> str:
    known = [json.loads(path.read_text())["group"] for path in keep.glob("*/how.json")]
    if known.count(group) < KEPT:
        number = 1 + max([int(path.name) for path in keep.iterdir() if path.name.isdigit()], default=0)
        folder = keep / f"{number:04}"
        if place is not None:
            shutil.copytree(place, folder / "in", symlinks=True)
        folder.mkdir(exist_ok=True)
        how = {"group": group, "line": line, "data": data.hex(), "traceback": whole}
        (folder / "how.json").write_text(json.dumps(how, indent=1))
    return f"FAILURE {group}"


def try_until(name: str, keep: Path, seed: int, until: float) -> None:
    """Try inputs until `until`, towards new lines where atheris is there."""
    from support.composed import conf_read_once

    conf_read_once().__enter__()  # for good: most of a composition is the reading of files that stay
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None:
        trying, draw = Trying(name, keep), random.Random(seed)
        while time.time() < until:
            trying.one(draw.randbytes(64))
        return
    with atheris.instrument_imports(include=["ebc_lab"]):  # not left: much is imported where it is used
        trying = Trying(name, keep)

        def one(data: bytes) -> None:
            if time.time() > until:
                os._exit(0)
            trying.one(data)

        corpus = keep / "reached"
        corpus.mkdir(exist_ok=True)
        draw = random.Random(seed)
        if not any(corpus.iterdir()):
            for number in range(64):
                (corpus / f"first{number}").write_bytes(draw.randbytes(64))
        limits = [
            "-timeout=1000000",
            "-rss_limit_mb=0",
            "-max_len=256",
            "-detect_leaks=0",
            f"-seed={seed + 1}",
        ]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={keep}/", str(corpus)], one)
        atheris.Fuzz()


# -- the process that watches --------------------------------------------------------------------------------


def watch(name: str, keep: Path, seed: int, minutes: float) -> None:
    """Keep a process that tries; another one follows one that dies or hangs, which is a failure itself."""
    until, started = time.time() + 60 * minutes, 0
    current = keep / "current"
    while time.time() < until - 5:
        given = ["--try-until", str(until), "--seed", str(seed + 1000 * started), "--keep", str(keep)]
        started += 1
        current.unlink(missing_ok=True)
        with open(keep / "log", "ab") as log:
            process = subprocess.Popen([sys.executable, __file__, name, *given], stdout=log, stderr=log)
        begun = time.time()
        while process.poll() is None:
            time.sleep(1)
            since = max(begun, current.stat().st_mtime if current.exists() else 0)
            if time.time() - since > WALL:
                process.kill()
                process.wait()
                break
        if process.returncode and current.exists():
            how = (
                "nothing for minutes"
                if process.returncode == -signal.SIGKILL
                else f"died, {process.returncode}"
            )
            data = current.read_bytes()
            end = (keep / "log").read_bytes()[-3000:].decode("utf-8", "replace")
            outcome = note_failure(keep, data, None, f"process {how}", how, end)
            with open(keep / "outcomes", "a") as file:
                file.write(f"{outcome}\n")
        elif process.returncode:
            raise SystemExit(
                f"it does not begin: {(keep / 'log').read_bytes()[-2000:].decode('utf-8', 'replace')}"
            )


def table(keep: Path) -> Iterator[str]:
    outcomes = (
        Counter((keep / "outcomes").read_text().splitlines()) if (keep / "outcomes").exists() else Counter()
    )
    failures = {k: n for k, n in outcomes.items() if k.startswith("FAILURE")}
    yield f"| inputs | {READ} | {REFUSED} | failures | their places |"
    yield "|---|---|---|---|---|"
    counts = (outcomes.total(), outcomes[READ], outcomes[REFUSED], sum(failures.values()), len(failures))
    yield f"| {' | '.join(map(str, counts))} |"
    for group, count in sorted(failures.items(), key=lambda pair: -pair[1]):
        yield f"{count:6} {group}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder of what failed")
    parser.add_argument("--more", type=Path, help="folder of further files for `judge`")
    parser.add_argument("--again", type=Path, help="a how.json: repeat this one, with its traceback")
    parser.add_argument("--try-until", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    keep = (asked.keep or Path("fuzz") / asked.target).resolve()
    keep.mkdir(parents=True, exist_ok=True)
    os.environ |= {f"XDG_{kind}_HOME": str(keep / kind.lower()) for kind in ("CACHE", "STATE")}
    os.environ["EBC_LAB_LOWBIT_CACHE"] = str(keep / "cache")
    if asked.try_until:
        return try_until(asked.target, keep, asked.seed, asked.try_until)
    if not (keep / "real.pickle").exists():
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            real = TARGETS[asked.target]().make(Path(folder), asked.more)
        (keep / "real.pickle").write_bytes(pickle.dumps(real))
    if asked.again:
        target = TARGETS[asked.target]()
        target.begin(pickle.loads((keep / "real.pickle").read_bytes()))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            print(
                target.attack(Draw(bytes.fromhex(json.loads(asked.again.read_text())["data"])), Path(folder))
            )
        return None
    watch(asked.target, keep, asked.seed, asked.minutes)
    print("\n".join(table(keep)))
    return None


if __name__ == "__main__":
    main()
