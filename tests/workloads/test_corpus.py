import hashlib

import numpy as np
import pytest
import torch

from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.data import DataConfig
from ebc_lab.workloads import corpus as corpus_module
from ebc_lab.workloads.batches import Batches, windows
from ebc_lab.workloads.corpus import describe, locate


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


@pytest.mark.parametrize(("content", "word"), [(b"\xff\xfe\x00bad", "UTF-8"), (None, "does not exist")])
def test_unusable_files_are_named(tmp_path, content, word):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        locate(DataConfig("path", str(path)))
    assert str(path) in str(caught.value)


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
