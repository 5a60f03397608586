"""Measurements that are kept for the user."""

import os
from itertools import count

import pytest

from ebc_lab.records.cache import MeasurementCache, cache_dir


@pytest.fixture
def measure():
    calls = count(1)
    return lambda: {"rate": next(calls)}


def test_a_measurement_is_made_once_for_what_it_depends_on(tmp_path, measure):
    about = {"cores": 2, "case": (1, "float32")}
    found = [MeasurementCache("speed", about, tmp_path).read_or_measure(measure) for _ in range(2)]
    assert found == 2 * [{"rate": 1}]
    assert MeasurementCache("speed", {**about, "cores": 4}, tmp_path).read() is None
    assert MeasurementCache("packing", about, tmp_path).read() is None
    assert measure() == {"rate": 2}
    assert all(path.name.startswith("speed-") for path in tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b'{"rate":', b"\xff\xfe", b"null", b'"x"', b"{}", b"[1]", b"true"])
def test_a_file_that_is_damaged_or_of_another_kind_is_measured_again(tmp_path, content):
    cache = MeasurementCache("speed", "x", tmp_path, form=float)
    cache.path.write_bytes(content)
    assert cache.read() is None
    assert cache.read_or_measure(lambda: 2.5) == cache.read() == 2.5


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, measure):
    (tmp_path / "file").touch()
    cache = MeasurementCache("speed", "x", tmp_path / "file")
    assert [cache.read_or_measure(measure)["rate"] for _ in range(2)] == [1, 2]


def test_measurements_lie_in_the_users_cache_folder_unless_another_is_given(tmp_path):
    assert MeasurementCache("speed", "x").path.parent == cache_dir()
    assert str(cache_dir()).startswith(os.environ["XDG_CACHE_HOME"])
    assert MeasurementCache("speed", "x", tmp_path).path.parent == tmp_path
