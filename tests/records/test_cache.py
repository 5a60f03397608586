"""Measurements that are kept for the user."""

from itertools import count

import pytest

from ebc_lab.records.cache import MeasurementCache


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ebc-lab"


@pytest.fixture
def measure():
    return count(1).__next__


def cache(kind="speed", about="x"):
    return MeasurementCache(kind, about, form=float)


def test_a_measurement_is_made_once_for_what_it_depends_on_and_kept_for_the_user(folder, measure):
    about = {"cores": 2, "case": (1, "float32")}
    assert [cache(about=about).read_or_measure(measure) for _ in range(2)] == [1, 1]
    assert cache(about={**about, "cores": 4}).read() is None
    assert cache("packing", about).read() is None
    assert measure() == 2
    assert [path.name[:6] for path in folder.iterdir()] == ["speed-"]


@pytest.mark.parametrize("content", [b"", b'{"rate":', b"\xff\xfe", b"null", b'"x"', b"{}", b"[1]", b"true"])
def test_a_file_that_is_damaged_or_of_another_kind_is_measured_again(folder, content):
    folder.mkdir()
    cache().path.write_bytes(content)
    assert cache().read() is None
    assert cache().read_or_measure(lambda: 2.5) == cache().read() == 2.5


def test_a_cache_that_cannot_be_written_costs_only_time(folder, measure):
    folder.touch()
    assert [cache().read_or_measure(measure) for _ in range(2)] == [1, 2]
