"""Corpora: locate, checksum, tokenise by character, split 90/5/5 in order, and draw batches on the device.

A corpus never mixes with another: its sha256 is part of every run's identity. Locating one needs no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import SPLITS, DataConfig
from ebc_lab.records.cache import cache_dir

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BOUNDARIES = (0.90, 0.95)  # of train | val | test


class CorpusUnavailable(UserError):
    """The text is nowhere on this machine and cannot be downloaded."""


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from. `warning` says what a reader of the results must know, if anything."""

    name: str  # shakespeare | pydoc | path
    title: str  # as tables and figures show it
    source: str
    text: str
    sha256: str  # of the UTF-8 bytes
    warning: str | None = None

    @property
    def vocabulary(self) -> list[str]:
        """The characters of the whole text, sorted."""
        return sorted(set(self.text))

    def tokens(self) -> dict[str, np.ndarray]:
        """Each split's tokens, int64, by name."""
        codes = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        _, ids = np.unique(codes, return_inverse=True)
        cuts = [int(len(ids) * b) for b in BOUNDARIES]
        return dict(zip(SPLITS, np.split(ids.astype(np.int64), cuts), strict=True))


def _read(path: Path, title: str, name: str, expected: str | None = None) -> Corpus:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the corpus {path} cannot be read ({error.strerror}): give another data.file."
        ) from None
    sha256 = hashlib.sha256(raw).hexdigest()
    if expected and sha256 != expected:
        raise UserError(
            f"{path} has sha256 {sha256[:12]}…, not {expected[:12]}…, so it is not tiny Shakespeare: "
            f"replace it, or use it under its own name with data=path data.file={path}."
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first.") from None
    return Corpus(name, title, str(path), text, sha256)


def _shakespeare(config: DataConfig, quiet: bool) -> Corpus:
    title = "tiny Shakespeare"
    given = os.environ.get("EBC_LAB_DATA")
    places = [Path(given).expanduser() / SHAKESPEARE_FILE] if given else []
    places.append(cache_dir() / SHAKESPEARE_FILE)
    for place in places:
        if place.is_file():
            return _read(place, title, "shakespeare", SHAKESPEARE_SHA256)
    return _read(_download(places[-1], quiet), title, "shakespeare", SHAKESPEARE_SHA256)


def _download(target: Path, quiet: bool) -> Path:
    import logging

    import pooch

    pooch.get_logger().setLevel(logging.ERROR)
    try:
        pooch.retrieve(
            SHAKESPEARE_URL,
            known_hash=f"sha256:{SHAKESPEARE_SHA256}",
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(progressbar=not quiet, timeout=20),
        )
    except Exception as error:
        reason = type(error).__name__
        raise CorpusUnavailable(
            f"tiny Shakespeare is not in EBC_LAB_DATA or {target.parent} and could not be downloaded ({reason}): "
            f"put {SHAKESPEARE_FILE} into a folder named by EBC_LAB_DATA, or use data=pydoc."
        ) from None
    return target


def _pydoc(config: DataConfig, quiet: bool) -> Corpus:
    from pydoc_data.topics import topics

    text = "\n".join(f"{name}\n{topics[name]}" for name in sorted(topics))
    title = "Python's pydoc topics"
    return Corpus("pydoc", title, "pydoc_data.topics", text, hashlib.sha256(text.encode()).hexdigest())


def _auto(config: DataConfig, quiet: bool) -> Corpus:
    try:
        return _shakespeare(config, quiet)
    except CorpusUnavailable:
        found = _pydoc(config, quiet)
        warning = "NOT Shakespeare: it could not be had, so this is the text of Python's own documentation"
        return Corpus(found.name, found.title, found.source, found.text, found.sha256, warning)


def _path(config: DataConfig, quiet: bool) -> Corpus:
    path = Path(config.file or "").expanduser()
    if not path.is_file():
        raise UserError(
            f"data.file={config.file} does not exist or is not a file: give the path of a UTF-8 text."
        )
    return _read(path.resolve(), path.name, "path")


CORPORA: dict[str, Callable[[DataConfig, bool], Corpus]] = {
    "auto": _auto,
    "shakespeare": _shakespeare,
    "pydoc": _pydoc,
    "path": _path,
}


def locate(config: DataConfig, *, quiet: bool = False) -> Corpus:
    """The corpus that `config` names, read and checked; downloaded once where it must be.

    Raises UserError: it cannot be had, its checksum is another than `config.sha256` or the pinned one, or it is not UTF-8.
    """
    corpus = CORPORA[config.name](config, quiet)
    if config.sha256 and corpus.sha256 != config.sha256:
        raise UserError(
            f"the corpus at {corpus.source} has changed: its sha256 is {corpus.sha256[:12]}…, the study was begun with "
            f"{config.sha256[:12]}…; put the old text back, or begin a new study."
        )
    return corpus


def describe(config: DataConfig) -> dict[str, str | int | None]:
    """What `ebc-lab data` prints."""
    corpus = locate(config)
    splits = ", ".join(f"{k} {len(v):,}" for k, v in corpus.tokens().items())
    return {
        "name": corpus.name,
        "title": corpus.title,
        "source": corpus.source,
        "sha256": corpus.sha256,
        "characters": len(corpus.text),
        "vocabulary": len(corpus.vocabulary),
        "splits": splits,
        "warning": corpus.warning,
    }


def check_length(corpus: Corpus, context: int) -> None:
    """Refuse a text whose smallest split cannot fill two windows of `context` tokens. Raises UserError."""
    shortest = len(corpus.text) - int(len(corpus.text) * BOUNDARIES[1])
    if shortest < 2 * context + 1:
        raise UserError(
            f"the corpus at {corpus.source} is too short: its {shortest} test characters must hold two windows of "
            f"{context} and one more; use a longer text or a smaller model.context."
        )
