"""How a corpus becomes tokens: its characters, bytes, byte pairs learned from it, or GPT-2's. No torch here.

A tokenizer's sha256 is part of a run's identity, as its corpus's is; characters need none, for they follow
from the corpus. `bpe` learns from the training split alone, so that nothing of val and test is in its tokens.
Bytes are the same 256 tokens for every text, so that a model of one text can be trained on another.

Bytes: Xue et al., arXiv:2105.13626. Byte pairs: Sennrich, Haddow & Birch, arXiv:1508.07909; of bytes: Radford
et al. 2019.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ebc_lab.config.errors import UserError, any_of, nearest
from ebc_lab.records.cache import MeasurementCache
from ebc_lab.records.files import read_regular

from .corpus import BOUNDARIES, Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Trained
    from tokenizers.models import BPE

KINDS = ("characters", "bytes", "bpe", "gpt2")
BYTES = 256  # every byte is a token of byte pairs, so that each text has tokens
NAMED = 5  # characters in a message
MOST_BYTES = 64 << 20  # of a tokenizer's file; those of 256,000 tokens have 35 MB


class Tokenizer(Protocol):
    """Text to token ids and back."""

    kind: str  # one of KINDS
    vocabulary: int  # ids are below it

    def encode(self, text: str) -> list[int]:
        """Its token ids. Raises UserError, naming up to five characters that the vocabulary has not."""

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; half a character is U+FFFD. Raises UserError for an id outside the vocabulary."""

    def to_json(self) -> str:
        """All that `from_json` needs to make the same tokenizer."""


@dataclass(frozen=True, eq=False)
class Tokenised:
    """A corpus in tokens."""

    splits: dict[str, np.ndarray]  # each split's ids, (n,) int64
    vocabulary: int
    characters: dict[str, int]  # of each split's text; empty where only its tokens are known
    sha256: str | None  # of the tokenizer's JSON; None for characters

    def characters_per_token(self) -> dict[str, float]:
        """Return, for each split, what turns nats per token into bits per character."""
        return {split: count / len(self.splits[split]) for split, count in self.characters.items()}


class Characters:
    """One token for each of the given characters; its id is the character's place."""

    kind = "characters"

    def __init__(self, characters: Sequence[str]):
        self.characters = list(characters)
        self.vocabulary = len(self.characters)
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        if outside := dict.fromkeys(text).keys() - self.ids.keys():
            raise _outside(sorted(outside))
        return [self.ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocabulary)
        return "".join(self.characters[i] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"characters": "".join(self.characters)})


class Bytes:
    """One token for each of the 256 bytes of UTF-8."""

    kind = "bytes"
    vocabulary = BYTES

    def encode(self, text: str) -> list[int]:
        _refuse_halves(text)
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocabulary)
        return bytes(ids).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"bytes": BYTES})


class BytePairs:
    """A byte-level tokenizer of the library tokenizers: of kind `bpe`, or `gpt2` from a folder."""

    def __init__(self, kind: str, trained: Trained):
        trained.no_truncation()  # a kept file may ask for what would lose text, or add to it
        trained.no_padding()
        self.kind = kind
        self.trained = trained
        self.vocabulary = max(trained.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        _refuse_halves(text)
        return list(self.trained.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocabulary)
        return str(self.trained.decode(list(ids), skip_special_tokens=False))

    def to_json(self) -> str:
        return str(self.trained.to_str())


def _refuse_halves(text: str) -> None:
    """Raise UserError for halves of characters, which UTF-8 cannot write."""
    if halves := [c for c in dict.fromkeys(text) if "\ud800" <= c <= "\udfff"]:
        raise _outside(halves)


def _outside(characters: Sequence[str]) -> UserError:
    more = f" and {len(characters) - NAMED} more" if len(characters) > NAMED else ""
    named = ", ".join(repr(c) for c in characters[:NAMED])
    return UserError(f"the vocabulary has no {named}{more}: leave such characters out.")


def _check_ids(ids: Iterable[int], vocabulary: int) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
    if wrong is not None:
        raise UserError(f"there is no token {wrong}: the vocabulary ends at {vocabulary - 1}.")


# -- making one ----------------------------------------------------------------------------------------------


def tokenizer(kind: str, corpus: Corpus, *, size: int = 512, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer `kind` for a corpus. `size`: of bpe's vocabulary; `folder`: where GPT-2's files are.

    A text too short for so many byte pairs has a smaller vocabulary. Raises UserError where the kind, the
    library or a file is missing, or a file is no such tokenizer.
    """
    if kind == "characters":
        return Characters(corpus.vocabulary)
    if kind == "bytes":
        return Bytes()
    if kind == "bpe":
        return _byte_pairs_of(corpus, size)
    if kind == "gpt2":
        return _from_folder(folder)
    raise _unknown(kind)


def from_json(kind: str, text: str) -> Tokenizer:
    """The tokenizer that `to_json` was called on. Raises UserError unless `text` is of such a one."""
    if kind not in KINDS:
        raise _unknown(kind)
    if kind == "bytes":
        return Bytes()
    if kind != "characters":
        return BytePairs(kind, _parsed(kind, text, "the kept tokenizer"))
    try:
        characters = json.loads(text)["characters"]
    except (ValueError, LookupError, TypeError):
        characters = None
    if not isinstance(characters, str) or len(set(characters)) < max(1, len(characters)):
        raise UserError("the kept tokenizer holds no list of different characters: keep the model anew.")
    return Characters(characters)


def _unknown(kind: str) -> UserError:
    return UserError(f"tokens={kind} is unknown{nearest(kind, KINDS)}: choose {any_of(KINDS)}.")


def _need_library(kind: str) -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        message = f'tokens={kind} needs the library tokenizers: pip install "ebc-lab[ebm]"'
        raise UserError(message) from None


def _parsed(kind: str, text: str, source: str) -> Trained:
    _need_library(kind)
    from tokenizers import Tokenizer as Trained

    try:
        return Trained.from_str(text)
    except Exception as error:  # what the library raises has no class of its own
        raise UserError(f"{source} is no tokenizer ({error}): replace it.") from None


def _byte_pairs_of(corpus: Corpus, size: int) -> BytePairs:
    """Learned from the training split, or as it was kept when it was."""
    if size <= BYTES:
        raise UserError(f"tokens.size={size} leaves no byte pair beside the {BYTES} bytes: choose more.")
    _need_library("bpe")
    from tokenizers import __version__

    cache = MeasurementCache("tokenizer", [corpus.sha256, size, BOUNDARIES, __version__], form=dict[str, str])
    cached = cache.read() or {}
    text = cached.get("tokenizer", "")
    if not text or cached.get("sha256") != _sha256(text):
        text = _learned(_texts(corpus)["train"], size)
        cache.write({"tokenizer": text, "sha256": _sha256(text)})
    return BytePairs("bpe", _parsed("bpe", text, str(cache.path)))


def _learned(text: str, size: int) -> str:
    """Byte pairs of a text as the library's JSON, always the same for the same text and version."""
    from tokenizers import models, pre_tokenizers, trainers

    trained = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([text], trainer)
    return str(trained.to_str())


def _byte_level(pairs: BPE) -> Trained:
    """Byte pairs as GPT-2 reads and writes them: every byte is a character, and no space is put before."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, pre_tokenizers

    trained = Trained(pairs)
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    return trained


def _from_folder(folder: str | Path | None) -> BytePairs:
    """GPT-2's tokenizer: tokenizer.json, else vocab.json with merges.txt."""
    if folder is None:
        raise UserError("tokens=gpt2 needs tokens.folder=FOLDER, which holds GPT-2's tokenizer.")
    _need_library("gpt2")
    from tokenizers.pre_tokenizers import ByteLevel

    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"tokens.folder={folder} is not a folder: name the one with GPT-2's tokenizer.")
    whole = place / "tokenizer.json"
    trained = _parsed("gpt2", _text_of(whole), str(whole)) if whole.exists() else _from_parts(place)
    lacking = BYTES - len({*ByteLevel.alphabet()} & trained.get_vocab().keys())
    if lacking:
        raise UserError(
            f"the tokenizer in {place} lacks {lacking} of the {BYTES} bytes, so that text would be lost: "
            "give GPT-2's."
        )
    return BytePairs("gpt2", trained)


def _from_parts(place: Path) -> Trained:
    from tokenizers.models import BPE

    parts = [place / "vocab.json", place / "merges.txt"]
    if missing := [path.name for path in parts if not path.exists()]:
        raise UserError(
            f"{place} has no tokenizer.json, and no {' and no '.join(missing)} to take instead: "
            "put GPT-2's tokenizer there."
        )
    for path in parts:
        _text_of(path)  # refuses what is no file before the library opens it
    try:
        return _byte_level(BPE.from_file(*map(str, parts)))
    except Exception as error:  # as in _parsed
        raise UserError(
            f"vocab.json and merges.txt in {place} are no tokenizer ({error}): replace them."
        ) from None


def _text_of(path: Path) -> str:
    try:
        return read_regular(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no tokenizer (not UTF-8): replace it.") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- a corpus in tokens --------------------------------------------------------------------------------------


def _texts(corpus: Corpus) -> dict[str, str]:
    """Return split -> its text."""
    return {split: corpus.text[part] for split, part in corpus.slices.items()}


def tokenised(tokenizer: Tokenizer, corpus: Corpus) -> Tokenised:
    """Each split of a corpus in tokens of its own: no token spans two splits.

    Raises UserError for a split without tokens, and for characters that the vocabulary has not.
    """
    texts = _texts(corpus)
    by_character = tokenizer.kind == "characters"
    if by_character and tokenizer.to_json() == Characters(corpus.vocabulary).to_json():
        splits = corpus.tokens()
    else:
        splits = {s: np.array(tokenizer.encode(text), dtype=np.int64) for s, text in texts.items()}
    if empty := [split for split, ids in splits.items() if not len(ids)]:
        raise UserError(
            f"the corpus at {corpus.source} is too short: its {any_of(empty)} split has no tokens; "
            "use a longer text."
        )
    characters = {split: len(text) for split, text in texts.items()}
    sha256 = None if by_character else _sha256(tokenizer.to_json())
    return Tokenised(splits, tokenizer.vocabulary, characters, sha256)
