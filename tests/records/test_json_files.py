"""What is read of a JSON file, and what is refused of it."""

import math
import os
import re

import numpy as np
import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.records import files
from ebc_lab.records.json_files import (
    checksum_holds,
    read_checksummed,
    read_json,
    with_checksum,
    write_checksummed,
    write_json,
)
from ebc_lab.records.paths import ProgressRecord

HOSTILE = {
    "deep list": b"[" * 100_000,
    "digits": b'{"a": ' + b"7" * 5000 + b"}",
    "NaN": b'{"a": NaN}',
    "half a surrogate pair": b'["\\ud800"]',
    "a number of 64 bits": b'{"a": 9223372036854775808}',
    "beyond a float": b"[1e999]",
    "not text": b"\xff\xfe",
    "empty": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_json_of_ours_is_refused_with_file_and_remedy(tmp_path, content):
    path = tmp_path / "found.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"found\.json is damaged \(.*\): delete it, and the next run"):
        read_json(path)
    with pytest.raises(UserError, match=r"found\.json is damaged \(.*\): put it back\."):
        read_checksummed(path, "put it back")


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)],
)
def test_what_is_no_file_is_refused_before_it_can_block(tmp_path, make):
    path = tmp_path / "found.json"
    make(path)
    with pytest.raises(UserError, match=r"found\.json (is not a file|cannot be read)"):
        read_json(path)


def test_a_missing_file_is_told_from_a_damaged_one_and_a_flood_is_not_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "flood.json").write_bytes(b" " * 101)
    with pytest.raises(UserError, match="is larger than 100 bytes"):
        files.read_regular(tmp_path / "flood.json", 100)
    assert len(files.read_regular(tmp_path / "flood.json", 101)) == 101


def test_texts_are_made_visible_after_the_checksum_is_checked(tmp_path):
    path = tmp_path / "found.json"
    raw = {"cause": "\x1b[2J\u202eevil\nnext line", "\x07key": ["caf\u00e9 \u03b4*\t"], "checksum": 0}
    write_checksummed(path, raw)
    found = read_checksummed(path, "")
    assert found == {"cause": r"\x1b[2J\u202eevil" + "\nnext line", r"\x07key": ["caf\u00e9 \u03b4*\t"]}
    write_checksummed(path, found)  # what was read can be written, and means the same
    assert read_checksummed(path, "") == found
    assert checksum_holds(with_checksum(found))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "expected `object`, got `array`"),
        ({"step": 3, "steps": 4, "steps_per_s": None}, "steps_per_s: expected `float`, got `null`"),
        ({"step": 10**30, "steps": 4, "steps_per_s": 1}, "10000000000000000000… is too large"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path, value, words):
    path = tmp_path / "progress.json"
    write_json(path, value)
    with pytest.raises(UserError, match=re.escape(f"progress.json is damaged ({words}): delete it")):
        read_json(path, ProgressRecord)


def test_what_json_does_not_have_can_be_recorded(tmp_path):
    path = tmp_path / "found.json"
    write_checksummed(path, {"a": "/data/caf\udce9", "\udcff": 1, 3: math.inf, "n": (np.int64(2), math.nan)})
    assert read_checksummed(path, "") == {"a": r"/data/caf\udce9", r"\udcff": 1, "3": None, "n": [2, None]}
