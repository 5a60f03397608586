import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ebc_lab.config.choices import changed
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.data import DataConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.workloads import corpus as corpus_module
from ebc_lab.workloads import losses
from ebc_lab.workloads.batches import Batches, windows
from ebc_lab.workloads.corpus import describe, locate
from ebc_lab.workloads.text import checked_text


@pytest.mark.parametrize("name", ["a\x1b[2Jb.txt", "a\u202eb.txt", "a\nb.txt"])
def test_a_file_whose_name_commands_a_terminal_or_breaks_a_picture_is_refused(tmp_path, text_file, name):
    (tmp_path / name).write_bytes(text_file.read_bytes())
    (tmp_path / "plain.txt").symlink_to(name)
    for path in (tmp_path / name, tmp_path / "plain.txt"):
        with pytest.raises(UserError, match="its name holds control characters: rename it") as error:
            locate(DataConfig("path", str(path)))
        assert name not in str(error.value) or "\n" in name


def test_path_splits_in_order_and_covers_the_text(text_file):
    corpus = locate(DataConfig("path", str(text_file)))
    tokens = corpus.tokens()
    assert corpus.sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()
    joined = np.concatenate([tokens[s] for s in ("train", "val", "test")])
    assert "".join(np.array(corpus.vocabulary)[joined]) == corpus.text
    n = len(corpus.text)
    assert [len(tokens[s]) for s in ("train", "val")] == [int(0.9 * n), int(0.95 * n) - int(0.9 * n)]


@pytest.fixture
def texts(tmp_path):
    """A folder of three texts, one of them in a folder inside it, and what is none."""
    folder = tmp_path / "texts"
    (folder / "more [2]").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, letter, length in (("b.txt", "b", 400), ("a.txt", "a", 1000), ("more [2]/c.txt", "c", 205)):
        (folder / name).write_text(letter * length)
    for name in ("notes.md", ".hidden/d.txt"):
        (folder / name).write_text("d" * 400)
    return folder


def test_each_of_several_files_gives_its_own_part_to_every_split(texts, monkeypatch):
    monkeypatch.chdir(texts.parent)
    three = ["texts/b.txt", "texts/more [2]/c.txt", "texts/a.txt"]
    ways = [three, three[::-1], "texts", "texts/", "texts/**/*.txt", ["texts/?.txt", "texts/more [2]"]]
    found = [locate(DataConfig("path", way)) for way in ways]
    assert len({(corpus.text, corpus.sha256) for corpus in found}) == 1
    for split, letters in {"train": (900, 360, 184), "val": (50, 20, 10), "test": (50, 20, 11)}.items():
        part = found[0].text[found[0].slices[split]]
        assert [part.count(letter) for letter in "abc"] == [*letters]
        assert len(found[0].tokens()[split]) == len(part) == sum(letters)
        assert len(re.findall(r"a+|b+|c+", part)) == 3
    assert found[2].title == "a.txt and 2 more files, 1,605 characters"
    shutil.move("texts", "elsewhere")
    Path("elsewhere/a.txt").rename("elsewhere/z.txt")
    assert locate(DataConfig("path", "elsewhere", found[0].sha256)).text == found[0].text


def test_one_file_is_the_same_text_however_it_is_named(texts):
    plain = locate(DataConfig("path", str(texts / "a.txt")))
    (texts / "a linked.txt").symlink_to("a.txt")
    for way in ([str(texts / "a.txt")], str(texts / "a*"), str(texts / "more [2]" / ".." / "a.txt")):
        assert locate(DataConfig("path", way)) == plain
    (texts / "[a].txt").write_text("literal")
    assert locate(DataConfig("path", str(texts / "[a].txt"))).text == "literal"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (["b.txt", "x.txt"], ["x.txt does not exist"]),
        ("*.xml", ["*.xml names no file"]),
        ("empty", ["empty is a folder without a .txt file in it or below it"]),
        (["b.txt", "."], ["b.txt twice"]),
        (["b.txt", "short"], ["short is too short to be cut into training, validation and test"]),
        (["b.txt", "binary"], ["binary is not UTF-8 text (byte 1)"]),
        (["b.txt", "pipe"], ["pipe is not a file"]),
        ("loop", ["loop holds a link that leads back to itself"]),
        ("x.txt", ["x.txt does not exist"]),
        ("binary", ["binary is not UTF-8 text (byte 1)"]),
    ],
)
def test_what_no_text_can_be_is_said_of_the_file_at_fault(named, words, texts):
    (texts / "empty").mkdir()
    (texts / "short").write_text("x" * 9)
    (texts / "binary").write_bytes(b"a\xff\x00")
    os.mkfifo(texts / "pipe")
    (texts / "loop").symlink_to("loop")
    several = [str(texts / name) for name in named] if isinstance(named, list) else str(texts / named)
    with pytest.raises(UserError) as caught:
        locate(DataConfig("path", several))
    assert all(f"{texts}/{word}" in str(caught.value) for word in words)


def test_files_shorter_than_a_window_are_told_of(texts):
    run = changed(RunConfig(), {"data": {"name": "path", "file": str(texts)}})
    assert checked_text(changed(run, {"model": {"context": 24}}))[0].warning is None
    for tokens in ("characters", "bytes"):
        run = changed(run, {"model": {"context": 32}, "tokens": {"name": tokens}})
        said = str(checked_text(run)[0].warning)
        assert said.startswith("the 3 files are so short, 27 test tokens each on average, that most windows")


def test_a_byte_order_mark_is_no_character_of_the_text(text_file, tmp_path):
    """With or without one, it is the same text, of the same name in a run's identity."""
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + text_file.read_bytes())
    plain = locate(DataConfig("path", str(text_file)))
    marked = locate(DataConfig("path", str(tmp_path / "marked.txt"), sha256=plain.sha256))
    assert (marked.text, marked.vocabulary) == (plain.text, plain.vocabulary)
    (tmp_path / "inside.txt").write_text("a\ufeffb\n" * 999, encoding="utf-8")
    assert "\ufeff" in locate(DataConfig("path", str(tmp_path / "inside.txt"))).vocabulary
    (tmp_path / "broken.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 5\)"):
        locate(DataConfig("path", str(tmp_path / "broken.txt")))


def test_pydoc_is_always_there():
    found = describe(DataConfig("pydoc"))
    assert found["characters"] > 300_000
    assert found["warning"] is None


@pytest.mark.parametrize("name", ["auto", "shakespeare"])
def test_a_wrong_checksum_is_an_error_even_under_auto(name, tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_text("not Shakespeare")
    monkeypatch.setenv("EBC_LAB_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"tinyshakespeare\.txt has sha256"):
        locate(DataConfig(name))


def test_the_pinned_text_is_taken_from_ebc_lab_data_and_nowhere_else_asked(tmp_path, monkeypatch):
    text = b"To be, or not to be"
    (tmp_path / "tinyshakespeare.txt").write_bytes(text)
    monkeypatch.setenv("EBC_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(corpus_module, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    assert locate(DataConfig("auto")).text == text.decode()


def test_a_changed_corpus_is_refused(text_file):
    with pytest.raises(UserError, match="has changed"):
        locate(DataConfig("path", str(text_file), "0" * 64))


def test_images_are_told_in_images():
    told = describe(DataConfig("digits"))
    assert (told["images"], told["classes"]) == (1797, 10)
    assert told["splits"] == "train 1,078, val 359, test 360"
    assert told["warning"] is None


def test_windows_predict_every_token_exactly_once():
    tokens = torch.arange(103)
    pairs = windows(tokens, 10)
    targets = torch.cat([y.flatten() for _, y in pairs])
    assert torch.equal(targets, torch.arange(1, 103))
    assert all(torch.equal(x + 1, y) for x, y in pairs)
    assert [tuple(x.shape) for x, _ in pairs] == [(10, 10), (1, 2)]


def test_fixed_windows_spread_over_the_split():
    [(x, _)] = windows(torch.arange(1001), 10, count=4)
    assert x[:, 0].tolist() == [0, 330, 660, 990]
    [(x, _)] = windows(torch.arange(31), 10, count=64)
    assert len(x) == 3


def test_batches_are_a_function_of_seed_and_step():
    tokens = torch.arange(5000)
    a, b = (Batches(tokens, 4, 8, seed=3) for _ in range(2))
    straight = [a.at(step) for step in range(300)]
    assert torch.equal(b.at(299)[0], straight[299][0])  # as a resumed run asks for it
    assert torch.equal(b.at(0)[0], straight[0][0])
    x, y = straight[0]
    assert torch.equal(x + 1, y)
    assert not torch.equal(Batches(tokens, 4, 8, seed=4).at(0)[0], x)
    starts = torch.cat([x[:, 0] for x, _ in straight])
    assert starts.min() >= 0
    assert starts.max() <= 5000 - 9
    assert len(starts.unique()) > 1000


@pytest.mark.parametrize("given", [True, False])
def test_a_missing_text_is_told_with_the_folder_that_lacks_it(given, tmp_path, monkeypatch):
    import pooch

    def offline(*args, **how):
        raise ConnectionError

    monkeypatch.setattr(pooch, "retrieve", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if given:
        monkeypatch.setenv("EBC_LAB_DATA", str(tmp_path))
    lacking = f"EBC_LAB_DATA={tmp_path} has no tinyshakespeare.txt" if given else "EBC_LAB_DATA is not set"
    with pytest.raises(UserError) as error:
        locate(DataConfig("shakespeare"))
    assert str(error.value).startswith(f"{lacking}, {tmp_path / 'cache'}")
    assert "downloading it failed (ConnectionError): put tinyshakespeare.txt into" in str(error.value)
    warning = locate(DataConfig("auto")).warning
    assert warning.startswith(f"NOT Shakespeare, since {lacking}, and downloading it failed: ")


def test_a_download_that_failed_is_not_tried_again_by_the_same_process(tmp_path, monkeypatch):
    import pooch

    tried = []
    monkeypatch.setattr(pooch, "retrieve", lambda *args, **how: tried.append(how) or 1 / 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [locate(DataConfig("auto")).name for _ in range(3)] == ["pydoc"] * 3
    assert len(tried) == 1


def test_exact_sums_of_windows_have_the_mean_and_the_spread_of_plain_ones():
    sums, count = [[3.5, 8.25], [1.0, 0.125]], torch.tensor([4, 4, 4, 1])
    plain = losses._spread([torch.tensor(some, dtype=torch.float64) for some in sums], count, 13)
    exact = losses._exact_spread([[int(x * losses.UNIT) for x in some] for some in sums], count, 13)
    mean = 12.875 / 13
    off = [3.5 - 4 * mean, 8.25 - 4 * mean, 1 - 4 * mean, 0.125 - mean]
    assert exact == pytest.approx((mean, sum(x * x for x in off)))
    assert plain == pytest.approx(exact, rel=1e-6)
