"""Corpora: find a text, check it, split it 90/5/5 in order, tokenise it by character. No torch here.

A corpus never mixes with another: its sha256 is part of every run's identity.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from ebc_lab.config.errors import UserError, count, require
from ebc_lab.config.identity import digest
from ebc_lab.config.parts.data import DataConfig
from ebc_lab.config.schema import SPLITS
from ebc_lab.records.cache import cache_dir

from .digits import CLASSES, digits
from .digits import SHA256 as DIGITS_SHA256
from .named import named_files
from .shards import ShardSet, found

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BOUNDARIES = (0.90, 0.95)  # of train | val | test


class CorpusUnavailable(UserError):
    """The text is not on this machine and cannot be downloaded. `why`: in a few words."""

    def __init__(self, message: str, why: str = "it could not be downloaded"):
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Corpus:
    """A text and its source. `warning`: what a reader of the results must know about it, if anything."""

    name: str  # shakespeare | pydoc | path | digits | bin
    title: str  # in tables and figures
    source: str
    text: str  # empty where it is images, or tokens
    sha256: str  # of the text's UTF-8 bytes, of the pixels and classes, or of the shards' checksums
    warning: str | None = None
    shards: ShardSet | None = None  # of data=bin
    lengths: tuple[int, ...] = ()  # characters of each file, of several; their parts are in `text` by split

    @property
    def vocabulary(self) -> list[str]:
        """The characters of the complete text, sorted."""
        return sorted(set(self.text))

    @property
    def slices(self) -> dict[str, slice]:
        """Split -> its part of the text. Of several files every one is cut alike, and first all training
        parts are laid end to end, then all of validation, then all of test."""
        lengths = self.lengths or (len(self.text),)
        cuts = [0, *(sum(int(n * b) for n in lengths) for b in BOUNDARIES), sum(lengths)]
        return {split: slice(a, b) for split, (a, b) in zip(SPLITS, pairwise(cuts), strict=True)}

    def tokens(self) -> dict[str, np.ndarray]:
        """Split -> its tokens, (n,) int64."""
        codes = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        used = np.zeros(sys.maxunicode + 1, dtype=bool)
        used[codes] = True
        ids = (used.cumsum() - 1)[codes]  # ranks of the characters used; sorting a long text takes a minute
        return {split: ids[part] for split, part in self.slices.items()}


def _read(path: Path, title: str, name: str, expected: str | None = None) -> Corpus:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the corpus {path} cannot be read ({error.strerror}): give another data.file."
        ) from None
    content = raw.removeprefix(codecs.BOM_UTF8)  # which says how the file is encoded, and is no character
    sha256 = hashlib.sha256(content).hexdigest()
    if expected and sha256 != expected:
        raise UserError(
            f"{path} has sha256 {sha256[:12]}…, not {expected[:12]}…, so it is not tiny Shakespeare: "
            f"replace it, or use it under its own name with data=path data.file={path}."
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = error.start + len(raw) - len(content)
        raise UserError(f"{path} is not UTF-8 text (byte {where}): convert it first.") from None
    return Corpus(name, title, str(path), text, sha256)


def _shakespeare(config: DataConfig, quiet: bool) -> Corpus:
    path = cache_dir() / SHAKESPEARE_FILE
    folder = os.environ.get("EBC_LAB_DATA")
    if folder and (Path(folder).expanduser() / SHAKESPEARE_FILE).is_file():
        path = Path(folder).expanduser() / SHAKESPEARE_FILE
    elif not path.is_file():
        _download(path, quiet)
    return _read(path, "tiny Shakespeare", "shakespeare", SHAKESPEARE_SHA256)


def _download(target: Path, quiet: bool) -> None:
    """Fetch it into the user's cache. Raises CorpusUnavailable, a second time without trying again."""
    if error := _fetched(target, quiet):
        folder = os.environ.get("EBC_LAB_DATA")
        lacking = f"EBC_LAB_DATA={folder} has no {SHAKESPEARE_FILE}" if folder else "EBC_LAB_DATA is not set"
        raise CorpusUnavailable(
            f"{lacking}, {target.parent} has none either, and downloading it failed ({error}): put "
            f"{SHAKESPEARE_FILE} into {folder or 'a folder named by EBC_LAB_DATA'}, or use data=pydoc.",
            f"{lacking}, and downloading it failed",
        )


@functools.cache
def _fetched(target: Path, quiet: bool) -> str | None:
    """Download into this file -> the name of the error, if it fails."""
    import logging

    import pooch

    pooch.get_logger().setLevel(logging.ERROR)
    if not quiet:
        print("downloading tiny Shakespeare, 1.1 MB …", file=sys.stderr)
    try:
        pooch.retrieve(
            SHAKESPEARE_URL,
            known_hash=f"sha256:{SHAKESPEARE_SHA256}",
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(timeout=20),
        )
    except Exception as error:
        return type(error).__name__
    return None


def _pydoc(config: DataConfig, quiet: bool) -> Corpus:
    from pydoc_data.topics import topics

    text = "\n".join(f"{name}\n{topics[name]}" for name in sorted(topics))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Corpus("pydoc", "Python's pydoc topics", "pydoc_data.topics", text, sha256)


def _auto(config: DataConfig, quiet: bool) -> Corpus:
    try:
        return _shakespeare(config, quiet)
    except CorpusUnavailable as error:
        warning = f"NOT Shakespeare, since {error.why}: this is the text of Python's own documentation"
        return replace(_pydoc(config, quiet), warning=warning)


def _path(config: DataConfig, quiet: bool) -> Corpus:
    texts = [_read(path, path.name, "path") for path in named_files("data.file", config.file)]
    return texts[0] if len(texts) == 1 else _joined(texts)


def _joined(texts: Sequence[Corpus]) -> Corpus:
    """Several files as one text, each of which gives its own part to every split. In a split these follow one
    another by their checksums, so that neither names nor folders change what is trained on."""
    for one in texts:
        require(
            all(one.text[part] for part in one.slices.values()),
            f"{one.source} is too short to be cut into training, validation and test, as each of several "
            "files is: leave it out, or put it into another file.",
        )
    first, others = texts[0], len(texts) - 1
    in_order = sorted(texts, key=lambda one: one.sha256)
    text = "".join(one.text[one.slices[split]] for split in SPLITS for one in in_order)
    return Corpus(
        "path",
        f"{first.title} and {count(others, 'more file')}, {len(text):,} characters",
        f"{first.source} and {others} more",
        text,
        digest({"texts": [one.sha256 for one in in_order]}),
        lengths=tuple(len(one.text) for one in in_order),
    )


def _digits(config: DataConfig, quiet: bool) -> Corpus:
    digits()  # refuses what is not there
    return Corpus("digits", "scikit-learn's digits", "sklearn.datasets.load_digits", "", DIGITS_SHA256)


def _bin(config: DataConfig, quiet: bool) -> Corpus:
    shards = ShardSet(found("data.files", config.files), found("data.val_files", config.val_files))
    held_out = {shard.sha256: shard.path for shard in shards.val}
    if leaked := next((shard.path for shard in shards.train if shard.sha256 in held_out), None):
        raise UserError(
            f"data.files names {leaked}, whose tokens are among data.val_files: give patterns that tell "
            "training from validation, 'folder/*_train_*.bin' and 'folder/*_val_*.bin'."
        )
    title = shards.train[0].path.name
    title += f" and {len(shards.train) - 1} more" if len(shards.train) > 1 else ""
    return Corpus("bin", title, str(shards.train[0].path), "", shards.sha256, shards=shards)


CORPORA: dict[str, Callable[[DataConfig, bool], Corpus]] = {
    "auto": _auto,
    "shakespeare": _shakespeare,
    "pydoc": _pydoc,
    "path": _path,
    "digits": _digits,
    "bin": _bin,
}


def locate(config: DataConfig, *, quiet: bool = False) -> Corpus:
    """The corpus that `config` names, read and checked; downloaded if it is not on this machine.

    Raises UserError where it is unavailable, not UTF-8, or not the text that a checksum names.
    """
    corpus = CORPORA[config.name](config, quiet)
    if config.sha256 and corpus.sha256 != config.sha256:
        raise UserError(
            f"the corpus at {corpus.source} has changed: its sha256 is {corpus.sha256[:12]}…, the study was "
            f"begun with {config.sha256[:12]}…; put the old text back, or begin a new study."
        )
    return corpus


def describe(config: DataConfig) -> dict[str, str | int | None]:
    """What `ebc-lab data` prints."""
    corpus = locate(config)
    whole: dict[str, str | int | None] = {
        k: getattr(corpus, k) for k in ("name", "title", "source", "sha256")
    }
    if corpus.name == "digits":
        counts = {split: len(images.classes) for split, images in digits().items()}
        whole |= {"images": sum(counts.values()), "classes": CLASSES}
    elif corpus.shards is not None:
        files = {"train": corpus.shards.train, "val and test": corpus.shards.val}
        counts = {split: sum(shard.count for shard in of) for split, of in files.items()}
        whole |= {"shards": sum(map(len, files.values())), "vocabulary": config.vocabulary}
    else:
        counts = {split: len(ids) for split, ids in corpus.tokens().items()}
        whole |= {"files": len(corpus.lengths) or None, "characters": len(corpus.text)}
        whole |= {"vocabulary": len(corpus.vocabulary)}
    splits = ", ".join(f"{k} {n:,}" for k, n in counts.items())
    return {**whole, "splits": splits, "warning": corpus.warning}
