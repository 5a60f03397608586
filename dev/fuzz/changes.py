"""Changes of files and of nested values, each read from a string of bytes."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
import random
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Tree = dict[str, bytes]  # path below a folder -> content
MARKUP = "<script>fuzz</script>"


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
                case 2 if isinstance(value, int | float) and abs(value) < 1e300:
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
                made = value.clone(memory_format=torch.contiguous_format)
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
