"""A text in characters, in byte pairs learned from it, and in tokens of a folder that stands for GPT-2's."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebc_lab.config.errors import UserError
from ebc_lab.workloads import tokens
from ebc_lab.workloads.corpus import Corpus
from ebc_lab.workloads.tokens import from_json, tokenised, tokenizer


def corpus_of(text):
    return Corpus("path", "a text", "a.txt", text, hashlib.sha256(text.encode()).hexdigest())


@pytest.fixture
def corpus(small_text):
    return corpus_of(small_text)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ebc-lab"


# -- characters ----------------------------------------------------------------------------------------------


def test_characters_are_the_tokens_that_the_corpus_has(corpus):
    found = tokenised(tokenizer("characters", corpus), corpus)
    expected = corpus.tokens()
    assert list(found.splits) == list(expected) == ["train", "val", "test"]
    for split, ids in expected.items():
        assert found.splits[split].dtype == np.int64
        np.testing.assert_array_equal(found.splits[split], ids)
    assert found.vocabulary == len(corpus.vocabulary)
    assert found.characters == {split: len(ids) for split, ids in expected.items()}
    assert found.characters_per_token() == {"train": 1.0, "val": 1.0, "test": 1.0}
    assert found.sha256 is None
    cut = tokenizer("characters", corpus)
    assert cut.decode(cut.encode("the moon")) == "the moon"
    assert cut.decode(np.array([0, 1])) == "".join(corpus.vocabulary[:2])
    assert (cut.encode(""), cut.decode([])) == ([], "")


def test_bytes_are_those_of_utf_8(corpus):
    cut = tokenizer("bytes", corpus)
    assert (cut.kind, cut.vocabulary) == ("bytes", 256)
    assert cut.encode("a€") == [97, 0xE2, 0x82, 0xAC]
    assert cut.decode([97, 0xE2, 0x82, 0xAC]) == "a€"
    assert cut.decode([97, 0xE2]) == "a\ufffd"  # the end of a character is missing
    with pytest.raises(UserError, match="256"):
        cut.decode([256])


def test_characters_outside_the_vocabulary_are_named_up_to_five(corpus):
    cut = tokenizer("characters", corpus)
    with pytest.raises(UserError, match="the vocabulary has no ',', '€': leave such characters out"):
        cut.encode("a moon €, € and rain")
    with pytest.raises(UserError, match="no '1', '2', '3', '4', '5' and 2 more: leave"):
        cut.encode("7654321")


def test_a_kept_list_of_characters_cuts_another_text(corpus):
    kept = from_json("characters", tokenizer("characters", corpus).to_json())
    other = corpus_of("a moon and a mat. " * 9)
    found = tokenised(kept, other)
    assert found.vocabulary == len(corpus.vocabulary) > len(other.vocabulary)
    assert "".join(kept.decode(ids) for ids in found.splits.values()) == other.text
    with pytest.raises(UserError, match="the vocabulary has no 'M'"):
        tokenised(kept, corpus_of("a Moon " * 30))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"characters": 5}', '{"characters": "aba"}', "{"])
def test_what_is_no_list_of_characters_is_refused(text):
    with pytest.raises(UserError, match="no list of different characters"):
        from_json("characters", text)


# -- byte pairs ----------------------------------------------------------------------------------------------


def test_byte_pairs_cover_each_split_and_make_it_shorter(corpus):
    cut = tokenizer("bpe", corpus, size=300)
    found = tokenised(cut, corpus)
    characters = tokenised(tokenizer("characters", corpus), corpus).characters
    assert found.characters == characters
    start = 0
    for split, ids in found.splits.items():
        assert ids.dtype == np.int64
        assert cut.decode(ids) == corpus.text[start : start + characters[split]]
        assert found.characters_per_token()[split] == characters[split] / len(ids) > 1.5
        start += characters[split]
    assert found.vocabulary == cut.vocabulary == 300
    assert max(ids.max() for ids in found.splits.values()) < 300
    assert found.sha256 == hashlib.sha256(cut.to_json().encode()).hexdigest()


def test_byte_pairs_cover_text_that_they_never_saw(corpus):
    cut = tokenizer("bpe", corpus)

    @given(st.text())
    def covers(text):
        assert cut.decode(cut.encode(text)) == text

    covers()
    assert cut.decode(cut.encode("日")[:1]) == "\ufffd"


def test_byte_pairs_are_learned_from_the_training_split_alone(corpus):
    kept = int(0.9 * len(corpus.text))
    other = corpus_of(corpus.text[:kept] + "§" * (len(corpus.text) - kept))
    assert tokenizer("bpe", other, size=290).to_json() == tokenizer("bpe", corpus, size=290).to_json()
    fewer = corpus_of("§" * kept + corpus.text[kept:])
    assert tokenizer("bpe", fewer, size=290).to_json() != tokenizer("bpe", corpus, size=290).to_json()


def test_a_text_too_short_for_so_many_pairs_has_a_smaller_vocabulary():
    corpus = corpus_of("ab " * 50)
    assert 256 < tokenizer("bpe", corpus, size=5000).vocabulary < 300


def test_byte_pairs_are_learned_once_for_a_text_and_a_size(corpus, own_cache, monkeypatch):
    learned = []
    learn = tokens._learned
    monkeypatch.setattr(tokens, "_learned", lambda text, size: learned.append(size) or learn(text, size))
    first = tokenizer("bpe", corpus, size=280).to_json()
    assert tokenizer("bpe", corpus, size=280).to_json() == first
    assert learned == [280]
    assert len(list(own_cache.iterdir())) == 1
    tokenizer("bpe", corpus, size=281)
    tokenizer("bpe", corpus_of(corpus.text + "."), size=280)
    assert learned == [280, 281, 280]


def test_a_kept_tokenizer_that_is_damaged_is_learned_anew(corpus, own_cache):
    first = tokenizer("bpe", corpus, size=280).to_json()
    (path,) = own_cache.iterdir()
    whole = path.read_text()
    for damaged in (whole[:900], "{}", whole.replace("th", "ht")):
        path.write_text(damaged)
        assert tokenizer("bpe", corpus, size=280).to_json() == first
        assert path.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_time_alone(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first, second = (tokenizer("bpe", corpus, size=280).to_json() for _ in range(2))
    assert first == second


@pytest.mark.thorough
def test_another_process_learns_the_same(corpus, tmp_path):
    (tmp_path / "text.txt").write_text(corpus.text)
    code = (
        "from pathlib import Path; from ebc_lab.workloads.tokens import tokenizer, tokenised; "
        "from ebc_lab.workloads.corpus import Corpus; import sys; "
        "corpus = Corpus('path', 't', 's', Path(sys.argv[1]).read_text(), 'x'); "
        "print(tokenised(tokenizer('bpe', corpus), corpus).sha256); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "text.txt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tokenised(tokenizer("bpe", corpus), corpus).sha256


@pytest.mark.parametrize("size", [256, 0, -1])
def test_a_size_without_a_pair_is_refused(corpus, size):
    with pytest.raises(UserError, match=f"tokens.size={size} leaves no byte pair"):
        tokenizer("bpe", corpus, size=size)


def test_half_a_surrogate_pair_is_no_text(corpus):
    with pytest.raises(UserError, match="the vocabulary has no"):
        tokenizer("bpe", corpus).encode("a\udcff")


def test_without_the_library_it_is_said_what_to_install(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for kind in ("bpe", "gpt2"):
        words = rf'tokens={kind} needs the library tokenizers: pip install "ebc-lab\[ebm\]"$'
        with pytest.raises(UserError, match=words):
            tokenizer(kind, corpus, folder=tmp_path)
        with pytest.raises(UserError, match=words):
            from_json(kind, "{}")
    assert tokenizer("characters", corpus).encode("a")


# -- a folder with GPT-2's -----------------------------------------------------------------------------------


@pytest.fixture
def folder(corpus, tmp_path):
    """Byte pairs as the files that GPT-2's tokenizer is published in."""
    place = tmp_path / "gpt2"
    place.mkdir()
    text = tokenizer("bpe", corpus, size=280).to_json()
    (place / "tokenizer.json").write_text(text)
    model = json.loads(text)["model"]
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return place


def test_both_forms_of_a_folder_give_the_same_tokens(corpus, folder):
    whole = tokenised(tokenizer("gpt2", corpus, folder=str(folder)), corpus)
    (folder / "tokenizer.json").unlink()
    parts = tokenizer("gpt2", corpus, folder=folder)
    assert parts.kind == "gpt2"
    assert parts.decode(parts.encode("a thé\n")) == "a thé\n"
    for split, ids in tokenised(parts, corpus).splits.items():
        np.testing.assert_array_equal(ids, whole.splits[split])


def test_a_file_that_asks_to_cut_and_to_fill_is_not_obeyed_and_its_added_tokens_count(corpus, folder):
    from tokenizers import Tokenizer

    path = str(folder / "tokenizer.json")
    trained = Tokenizer.from_file(path)
    trained.enable_truncation(8)
    trained.enable_padding(length=16)
    trained.add_special_tokens(["<|endoftext|>"])
    trained.save(path)
    cut = tokenizer("gpt2", corpus, folder=folder)
    assert cut.decode(cut.encode(corpus.text)) == corpus.text
    assert cut.decode(cut.encode("a")) == "a"
    assert cut.vocabulary == 281
    assert cut.decode([280]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", tokens.KINDS)
def test_a_tokenizer_comes_back_from_json(corpus, folder, kind):
    cut = tokenizer(kind, corpus, folder=folder)
    again = from_json(kind, cut.to_json())
    assert again.kind == kind
    assert again.vocabulary == cut.vocabulary
    assert again.encode(corpus.text) == cut.encode(corpus.text)
    assert tokenised(again, corpus).sha256 == tokenised(cut, corpus).sha256


def test_ids_outside_the_vocabulary_are_refused(corpus, folder):
    for kind in tokens.KINDS:
        cut = tokenizer(kind, corpus, folder=folder)
        for wrong in (-1, cut.vocabulary):
            with pytest.raises(UserError, match=f"no token {wrong}: the vocabulary ends at"):
                cut.decode([0, wrong])


def test_missing_and_damaged_files_are_refused(corpus, folder):
    with pytest.raises(UserError, match=r"tokens=gpt2 needs tokens\.folder=FOLDER"):
        tokenizer("gpt2", corpus)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        tokenizer("gpt2", corpus, folder=folder / "nowhere")
    for content, words in ((b"{}", "is no tokenizer"), (b"\xff", "not UTF-8")):
        (folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"tokenizer\.json is no tokenizer.*: replace it|{words}"):
            tokenizer("gpt2", corpus, folder=folder)
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text("a b c d\n")
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt in .* are no tokenizer"):
        tokenizer("gpt2", corpus, folder=folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json, and no merges\.txt to take instead"):
        tokenizer("gpt2", corpus, folder=folder)
    with pytest.raises(UserError, match="the kept tokenizer is no tokenizer"):
        from_json("gpt2", "{}")


def test_a_vocabulary_that_would_lose_text_is_refused(corpus, folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({k: v for k, v in vocabulary.items() if k not in "é!?Z"}))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="lacks 4 of the 256 bytes, so that text would be lost"):
        tokenizer("gpt2", corpus, folder=folder)


# -- all kinds -----------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_refused_with_the_nearest(corpus):
    for refused in (lambda: tokenizer("bep", corpus), lambda: from_json("bep", "{}")):
        with pytest.raises(
            UserError, match=r"tokens=bep is unknown \(did you mean bpe\?\): choose characters"
        ):
            refused()


@pytest.mark.parametrize("kind", ["characters", "bpe"])
@pytest.mark.parametrize(
    ("text", "split"), [("", "train, val or test"), ("a", "train or val"), ("abc", "val")]
)
def test_a_split_without_tokens_is_refused(kind, text, split):
    corpus = corpus_of(text)
    with pytest.raises(UserError, match=rf"a\.txt is too short: its {split} split has no tokens"):
        tokenised(tokenizer(kind, corpus), corpus)
