import io
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebc_lab.study.store import container

FILES = {
    "manifest.json": json.dumps({str(i): i for i in range(30)}, indent=1).encode(),
    "auto_decisions.json": b"{}" * 40,
    "report.html": b"",
    "runs/a/steps.csv": b"1,0.5,0.25\n" * 300,
    "runs/b/picture.png": random.Random(0).randbytes(300),
}


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    container.write(out, ((name, lambda content=content: iter([content])) for name, content in files.items()))
    return out.getvalue()


def told(path: Path, files: dict[str, bytes] = FILES) -> tuple[list[str], dict[str, bytes]]:
    """(everything said of a file, what was unpacked from it)."""
    seen: dict[str, list[bytes]] = {}

    def sink(name: str) -> container.Put:
        seen[name] = []
        return seen[name].append

    said: list[str] = []
    try:
        for part, what in container.read(path, sink, lambda: sorted(set(files) - {container.FIRST})):
            said.append(f"{part}: {what}")
    except container.Unreadable as error:
        said.append(str(error))
    return said, {name: b"".join(pieces) for name, pieces in seen.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.zip"


def regions(raw: bytes) -> Iterator[tuple[int, str]]:
    """(first byte, what a message about it must name), in order."""
    with zipfile.ZipFile(io.BytesIO(raw)) as found:
        yield from ((info.header_offset, info.filename) for info in found.infolist())
        yield found.start_dir, "the central directory"
    yield len(raw) - 22, "the end record"


def test_what_is_written_is_read_and_any_unzip_reads_it(path):
    path.write_bytes(packed(FILES))
    assert told(path) == ([], FILES)
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        assert {name: found.read(name) for name in found.namelist()} == FILES
        assert {info.date_time for info in found.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr >> 16 for info in found.infolist()} == {0o100644}


def test_one_flipped_bit_at_any_byte_is_noticed_and_its_place_is_named(path):
    raw = packed(FILES)
    places = list(regions(raw))
    draw = random.Random(1)
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        said, _ = told(path)
        name = [what for first, what in places if first <= at][-1]
        assert any(name in line for line in said), (at, name, said)


def test_a_byte_that_unpacks_to_the_same_is_noticed_all_the_same(path):
    """The bits that fill up the last byte of deflated data: no checksum of the contents sees them."""
    raw = bytearray(packed(FILES))
    with zipfile.ZipFile(io.BytesIO(raw)) as found:
        last = found.getinfo("runs/a/steps.csv").header_offset - 1  # of report.html, which holds nothing
    raw[last] ^= 0x80
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
    said, unpacked = told(path)
    assert unpacked == FILES
    assert len(said) == 1
    assert said[0].startswith("report.html: bytes")


def test_changed_contents_are_said_to_be_that(path):
    raw = bytearray(packed(FILES))
    with zipfile.ZipFile(io.BytesIO(raw)) as found:
        at = found.start_dir - 100  # among bytes that do not compress, and are packed as they are
    raw[at] ^= 1
    path.write_bytes(raw)
    [said] = told(path)[0]
    assert said.startswith("runs/b/picture.png: bytes")
    assert said.endswith("its contents are not those that were packed")


@pytest.mark.parametrize("cut", range(1, 1500, 37))
def test_a_file_that_is_cut_off_is_noticed(path, cut):
    raw = packed(FILES)
    path.write_bytes(raw[: max(1, len(raw) - cut)])
    assert told(path)[0]


def test_bytes_in_front_behind_and_between_are_noticed(path):
    raw = packed(FILES)
    places = [first for first, _ in regions(raw)]
    for at in (*places, len(raw)):
        path.write_bytes(raw[:at] + b"\0" + raw[at:])
        assert told(path)[0], at
    path.write_bytes(raw + b"PK")
    assert told(path)[0] == [f"the end of the file: byte {len(raw)}: 2 byte(s) too many"]


def test_a_zip_that_another_program_packed_is_said_to_be_one(path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as out:
            for name, content in FILES.items():
                out.writestr(name, content)
        assert told(path)[0] == [
            "the file: it is a zip, but none that `ebc-lab export` has written, or it was packed again"
        ]
    path.write_text("a text")
    assert told(path)[0] == ["the file: it is no zip"]


def test_what_unpacks_to_very_much_more_is_not_unpacked(path):
    path.write_bytes(packed({**FILES, "runs/c/steps.csv": bytes(4 << 20)}))
    said, unpacked = told(path, {**FILES, "runs/c/steps.csv": b""})
    assert unpacked["runs/c/steps.csv"] == b""
    assert "it says that it unpacks to 4194304 bytes, 200 times its size and more" in said[0]


def test_more_is_unpacked_than_the_limit_of_a_piece(path):
    draw = random.Random(2)
    content = b"".join(b"%d,%d\n" % (i, draw.randrange(10)) for i in range(600_000))
    path.write_bytes(packed({**FILES, "runs/c/steps.csv": content}))
    said, unpacked = told(path, {**FILES, "runs/c/steps.csv": b""})
    assert said == []
    assert unpacked["runs/c/steps.csv"] == content


def test_more_files_than_a_plain_zip_can_count(path):
    files = {"manifest.json": b"{}", **{f"runs/{i:05}": b"" for i in range(0x10000)}}
    path.write_bytes(packed(files))
    assert told(path, files)[0] == []
    with zipfile.ZipFile(path) as found:
        assert len(found.namelist()) == len(files)


def test_a_file_that_begins_beyond_4_gib_is_found_by_other_programs(path):
    whole, far = packed({"manifest.json": b"far away"}), 5 << 30
    with zipfile.ZipFile(io.BytesIO(whole)) as found:
        [info], start = found.infolist(), found.start_dir
    entry = container.Entry("manifest.json", info.CRC, info.compress_size, info.file_size, bytes(32), far)
    with open(path, "wb") as out:  # with a hole, which takes no room
        out.seek(far)
        out.write(whole[:start])
        out.write(entry.central())
        out.write(container.end_records(1, len(entry.central()), entry.end))
    with zipfile.ZipFile(path) as found:
        assert found.read("manifest.json") == b"far away"
