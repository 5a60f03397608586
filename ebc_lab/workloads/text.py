"""A run's text: found, cut into tokens, and refused where it is too short for the run. No torch here."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ebc_lab.config.errors import UserError
from ebc_lab.config.machine import chosen_device, installed
from ebc_lab.config.schema import RunConfig

from .corpus import Corpus, locate
from .shards import ShardSet, batches_in, head_of, too_short
from .tokens import Tokenised, Tokenizer, tokenised, tokenizer

TOKENS_PER_SPLAT = 2  # of the training text, at the least


def checked_text(run: RunConfig, *, quiet: bool = False) -> tuple[Corpus, str | None]:
    """The run's corpus, long enough for the run, and the checksum of its tokenizer; None for characters.

    Raises UserError, also where either is not the one that a checksum in the settings names.
    """
    corpus = locate(run.data, quiet=quiet)
    if run.workload.name == "images":
        return corpus, None
    if corpus.shards is not None:
        _check_shards(run, corpus.shards)
        return corpus, None
    lengths = checked_lengths(run, corpus)
    _check_splats(run, lengths["train"])
    if run.tokens.name == "characters":
        vocabulary, sha256 = len(corpus.vocabulary), None
    else:
        text = tokenised_of(run, corpus)
        vocabulary, sha256 = text.vocabulary, text.sha256
    _check_embeddings(run, vocabulary)
    return _with_crossings(corpus, run.model.context, lengths["test"]), sha256


def checked_lengths(run: RunConfig, corpus: Corpus) -> dict[str, int]:
    """Return split -> how many tokens of the run a text has. Raises UserError where these are too few."""
    if run.tokens.name == "characters":
        lengths = {split: part.stop - part.start for split, part in corpus.slices.items()}
        shortest, unit = lengths["test"], "characters"
    else:
        lengths = {split: len(ids) for split, ids in tokenised_of(run, corpus).splits.items()}
        shortest, unit = min(lengths.values()), "tokens"
    context = run.model.context
    if shortest < 2 * context + 1:
        raise UserError(
            f"the corpus at {corpus.source} is too short: its {shortest} test {unit} must hold two windows "
            f"of {context} and one more; use a longer text or a smaller model.context."
        )
    return lengths


def _with_crossings(corpus: Corpus, context: int, tokens: int) -> Corpus:
    """Return the corpus with a warning where most windows of its test split, of so many tokens, begin in one
    file and end in another."""
    each = tokens // max(1, len(corpus.lengths))
    if len(corpus.lengths) < 2 or each >= context:
        return corpus
    warning = (
        f"the {len(corpus.lengths):,} files are so short, {each} test tokens each on average, that most "
        f"windows of {context} tokens on which a model is judged cross from one file into another"
    )
    return replace(corpus, warning=warning)


def _check_shards(run: RunConfig, shards: ShardSet) -> None:
    """Refuse tokens that the model does not know, and splits that are too short. Raises UserError."""
    largest = shards.largest
    if largest.largest >= run.data.vocabulary:
        raise UserError(
            f"{largest.path} holds token {largest.largest}, and data.vocabulary={run.data.vocabulary} ends "
            f"at {run.data.vocabulary - 1}: raise it, or give shards of the same tokenizer."
        )
    context = run.model.context
    if run.data.val_tokens < 2 * context:
        raise UserError(
            f"data.val_tokens={run.data.val_tokens} must hold two windows of model.context={context}."
        )
    wanted, there = 2 * (run.data.val_tokens + 1), sum(shard.count for shard in shards.val)
    if there < wanted:
        raise UserError(
            f"data.val_files hold {there} tokens, and data.val_tokens={run.data.val_tokens} takes {wanted} "
            "for validation and test together: give more shards, or make it smaller."
        )
    if run.data.order == "random" and max(shard.count for shard in shards.train) <= context:
        raise UserError(f"no shard of data.files holds a window of model.context={context} tokens.")


def check_length_of(run: RunConfig, corpus: Corpus, steps: int) -> None:
    """Refuse shards that are read in order and end before so many steps. Raises UserError."""
    if corpus.shards is None or run.data.order != "in_order":
        return
    tokens = run.tokens_per_step
    batches = sum(batches_in(corpus.shards.train, tokens))
    if batches < steps:
        raise UserError(f"{steps} steps are too many: {too_short(batches, tokens)}")


def _check_splats(run: RunConfig, tokens: int) -> None:
    """Refuse more splats than the text can feed. Raises UserError."""
    if run.workload.name != "ebm" or not run.ebm.splats:
        return
    most = tokens // TOKENS_PER_SPLAT
    if run.ebm.splats > most:
        raise UserError(
            f"ebm.splats={run.ebm.splats} is more than one for {TOKENS_PER_SPLAT} of the {tokens} training "
            f"tokens: {most} at most."
        )
    from ebc_lab.ebm.index import chosen
    from ebc_lab.ebm.starts import splats_at

    kind = chosen(run.index.name, run.ebm.splats, chosen_device(run.device) == "cuda")
    if kind != "exact" and not installed("faiss"):
        raise UserError(
            f"index={run.index.name} searches {run.ebm.splats} splats with the library faiss: pip "
            "install 'ebc-lab[ebm]', or index=exact."
        )
    first = splats_at(0, run.steps, run.ebm.splats, tokens)
    if run.ebm.neighbours > first:
        raise UserError(
            f"ebm.neighbours={run.ebm.neighbours} is more than the {first} splats that there are in the "
            "first third of the run: choose fewer, or more of ebm.splats."
        )


def _check_embeddings(run: RunConfig, vocabulary: int) -> None:
    """Refuse GPT-2's embeddings that are not there, or of other tokens, and counted ones of more tokens than
    can be had without a library that is missing. Raises UserError."""
    if run.workload.name != "ebm":
        return
    from ebc_lab.ebm.embeddings import PLAIN_UP_TO, gpt2_weight

    if run.ebm.embeddings != "gpt2":
        if vocabulary > PLAIN_UP_TO and not installed("sklearn"):
            raise UserError(
                f"ebm.embeddings={run.ebm.embeddings} of {vocabulary} tokens needs the library scikit-learn: "
                f"pip install 'ebc-lab[ebm]', or at most {PLAIN_UP_TO} tokens."
            )
        return
    try:
        known = len(gpt2_weight(str(run.ebm.gpt2)))
    except ValueError as error:
        raise UserError(str(error)) from None
    if known != vocabulary:
        raise UserError(
            f"ebm.gpt2={run.ebm.gpt2} has {known} embeddings for {vocabulary} tokens: give the folder of the "
            "same model as tokens.folder."
        )


def tokenizer_of(run: RunConfig, corpus: Corpus) -> Tokenizer:
    """The run's tokenizer. Raises UserError, also where only its tokens are known."""
    if corpus.shards is not None:
        raise UserError("data=bin is tokens alone, and no text can be cut as they were: choose another data.")
    return _tokenizer(run.tokens.name, corpus, run.tokens.size, run.tokens.folder)


@functools.lru_cache(maxsize=2)  # a run may look at the text, too, that its weights come from
def _tokenizer(kind: str, corpus: Corpus, size: int, folder: str | None) -> Tokenizer:
    return tokenizer(kind, corpus, size=size, folder=folder)


@functools.lru_cache(maxsize=2)  # a run may look at the text, too, that its weights come from
def _cut(kind: str, corpus: Corpus, size: int, folder: str | None) -> Tokenised:
    """Once for a process: a check and the workload each ask for it."""
    return tokenised(_tokenizer(kind, corpus, size, folder), corpus)


@functools.lru_cache(maxsize=2)
def _held_out(shards: ShardSet, count: int) -> dict[str, NDArray[np.int64]]:
    """The validation and test splits of shards, each (count + 1,): so many predictions."""
    starts = {"val": 0, "test": count + 1}
    return {split: head_of(shards.val, start, count + 1) for split, start in starts.items()}


def tokenised_of(run: RunConfig, corpus: Corpus) -> Tokenised:
    """The corpus in the run's tokens; of shards without the training split. Raises UserError where the
    tokenizer is not the run's."""
    if corpus.shards is not None:
        held_out = _held_out(corpus.shards, run.data.val_tokens)
        return Tokenised(held_out, run.data.vocabulary, {}, None)
    text = _cut(run.tokens.name, corpus, run.tokens.size, run.tokens.folder)
    known = run.tokens.sha256
    if known and text.sha256 != known:
        raise UserError(
            f"the tokenizer of tokens={run.tokens.name} has changed: its sha256 is {str(text.sha256)[:12]}…, "
            f"the run was begun with {known[:12]}…; put the old one back, or begin anew."
        )
    return text
