"""A run's text: which one, in which tokens, and what is refused of it before a run is begun."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from support.ebm_runs import tiny_ebm

from ebc_lab.config.choices import changed
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import identity
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text, tokenised_of

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def run(text_file):
    return tiny_ebm(text_file)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder such as GPT-2's, made up: a tokenizer without merges, and embeddings of its 257 tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = {letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), "Ġt"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\n")
    weight = torch.randn(257, 12, generator=torch.Generator().manual_seed(0))
    torch.save(
        {"transformer.wte.weight": weight, "wpe.weight": torch.zeros(4, 12)}, folder / "pytorch_model.bin"
    )
    return folder


def with_gpt2(run, folder, **ebm):
    return changed(run, {"tokens": {"name": "gpt2", "folder": str(folder)}, "ebm": ebm})


def test_characters_have_no_tokenizer_to_pin(run):
    corpus, sha256 = checked_text(run)
    assert sha256 is None
    assert pinned(run, corpus, sha256).tokens == run.tokens
    assert pinned(run, corpus, sha256).data.sha256 == corpus.sha256
    text = tokenised_of(run, corpus)
    assert text.characters_per_token() == {"train": 1.0, "val": 1.0, "test": 1.0}


def test_byte_pairs_are_part_of_what_a_run_is(run):
    pairs = changed(run, {"tokens": {"name": "bpe", "size": 280}})
    corpus, sha256 = checked_text(pairs)
    text = tokenised_of(pairs, corpus)
    assert text.sha256 == sha256
    assert all(1.2 < share < 6 for share in text.characters_per_token().values())
    fixed = pinned(pairs, corpus, sha256)
    assert checked_text(fixed)[1] == sha256
    assert identity(fixed)["tokens"] == {"name": "bpe", "size": 280, "sha256": sha256}
    assert "tokens" not in identity(run)
    with pytest.raises(
        UserError, match=r"the tokenizer of tokens=bpe has changed: its sha256 is .*, the run was"
    ):
        checked_text(replace(fixed, tokens=replace(fixed.tokens, sha256="0" * 64)))


@pytest.mark.parametrize("name", ["characters", "bpe"])
def test_a_text_whose_splits_hold_too_little_is_refused(run, tmp_path, name):
    short = tmp_path / "short.txt"
    short.write_text("abc def " * 20)
    few = changed(run, {"tokens": {"name": name}, "data": {"file": str(short), "sha256": None}})
    with pytest.raises(UserError, match=r"the corpus at .*short\.txt is too short"):
        checked_text(few)


def test_splats_are_fed_by_the_tokens_that_there_are(run):
    most = len(tokenised_of(run, checked_text(run)[0]).splits["train"]) // 2
    assert checked_text(changed(run, {"ebm": {"splats": most}}))
    with pytest.raises(
        UserError, match=f"ebm.splats={most + 1} is more than one for 2 of the .*: {most} at most"
    ):
        checked_text(changed(run, {"ebm": {"splats": most + 1}}))
    gpt = changed(run, {"workload": {"name": "gpt"}, "ebm": {"splats": most + 1}})
    assert checked_text(gpt)  # which has no splats


def test_no_more_neighbours_than_splats_at_first(run):
    assert checked_text(changed(run, {"ebm": {"splats": 160, "neighbours": 16}}))
    with pytest.raises(
        UserError, match=r"ebm\.neighbours=17 is more than the 16 splats .* first third of the run"
    ):
        checked_text(changed(run, {"ebm": {"splats": 160, "neighbours": 17}}))
    assert checked_text(changed(run, {"ebm": {"splats": 0, "neighbours": 17}}))


def test_gpt2s_folder_gives_tokens_and_embeddings(run, gpt2):
    chosen = with_gpt2(run, gpt2, embeddings="gpt2", gpt2=str(gpt2))
    corpus, sha256 = checked_text(chosen)
    assert sha256
    assert tokenised_of(chosen, corpus).vocabulary == 257


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ({"wpe.weight": torch.zeros(3, 4)}, "has no wte.weight"),
        ({"wte.weight": torch.ones(256, 4)}, "has 256 embeddings for 257 tokens"),
    ],
)
def test_gpt2s_embeddings_are_looked_at_before_a_run_begins(run, gpt2, tmp_path, content, words):
    if content is None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"PK, but no archive")
    else:
        torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as refused:
        checked_text(with_gpt2(run, gpt2, embeddings="gpt2", gpt2=str(tmp_path)))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_embeddings_of_many_tokens_are_refused_where_their_library_is_missing(run, tmp_path, monkeypatch):
    many = "".join(chr(0x4E00 + i) for i in range(2100))
    (tmp_path / "many.txt").write_text(many * 40, encoding="utf-8")
    chosen = replace(run, data=replace(run.data, name="path", file=str(tmp_path / "many.txt"), sha256=None))
    checked_text(chosen)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"of 2100 tokens needs the library scikit-learn: pip install"):
        checked_text(chosen)
    checked_text(run)  # few tokens need none
