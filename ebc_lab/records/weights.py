"""Files of weights with a checksum: weights.pt of a finished run, checkpoint.pt of an unfinished run.

The first line holds the checksum of all that follows. The second line describes the weights in JSON. The rest
is the output of `torch.save`. Nothing in this module needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ebc_lab.config.errors import UserError, shown

from .files import opened
from .paths import RUNS, RunFiles

FORMAT = 1
KINDS = ("weights", "checkpoint")
ARCHIVE = b"PK"  # the first bytes that torch.save writes


class About(TypedDict):
    """The description of weights: the model, tokens and text with which they were trained."""

    format: int  # version of this file format
    model: dict[str, Any]  # settings of the model
    levels: str  # quantizer levels of the hidden matrices
    tokens: str  # kind of tokens
    tokenizer: str  # sha256 of the tokenizer
    vocabulary: int  # number of tokens in it
    text: dict[str, Any]  # name and sha256 of the training text


@dataclass(frozen=True)
class KeptWeights:
    """The contents of a file of weights whose checksum was verified."""

    path: Path
    sha256: str  # of the whole file
    about: About
    archive: bytes  # the output of torch.save


def seal(kind: str, about: About, archive: bytes) -> bytes:
    """Return the contents of a file of weights, including the checksum. `kind`: one of KINDS."""
    rest = json.dumps(about, sort_keys=True).encode() + b"\n" + archive
    return _first_line(kind, rest) + rest


def _first_line(kind: str, rest: bytes) -> bytes:
    return f"ebc-lab {kind}, sha256 {hashlib.sha256(rest).hexdigest()}\n".encode()


def unseal(whole: bytes, kinds: Iterable[str] = KINDS) -> tuple[About | None, bytes]:
    """Return the description and the archive that were given to `seal`. The description is None for a
    checkpoint of an earlier version. Raises ValueError if the checksum is missing or wrong."""
    line, newline, rest = whole.partition(b"\n")
    if line + newline not in [_first_line(kind, rest) for kind in kinds]:
        raise ValueError("its checksum does not match")
    if rest.startswith(ARCHIVE):
        return None, rest
    about, _, archive = rest.partition(b"\n")
    described: About = json.loads(about)
    return described, archive


def find_weights(named: str, folders: Iterable[Path] = ()) -> Path:
    """Return the file of weights, or else the checkpoint, to which `named`, the value of `init.run`, refers.
    `named` is a file or a run's folder, relative to the working folder or to one of `folders`, or it is
    STUDY/RUN_ID within one of `folders`. Raises UserError if there is no such file."""
    written = Path(named).expanduser()
    places = [written]
    for folder in folders:
        places.append(folder / written)
        if len(written.parts) == 2:
            places.append(folder / written.parts[0] / RUNS / written.parts[1])
    for place in places:
        if place.is_file():
            return place.resolve()
        files = RunFiles(place)
        kept = [path for path in (files.weights, files.checkpoint) if path.is_file()]
        if kept:
            return kept[0].resolve()
    there = next((place for place in places if place.is_dir()), None)
    what = (
        f"{there} holds no weights: train that run again with init.keep=true"
        if there
        else "there is no such run: give its folder, its weights.pt, or STUDY/RUN_ID"
    )
    raise UserError(f"init.run={shown(named)}: {what}.")


def read_weights(path: Path, sha256: str | None = None) -> KeptWeights:
    """Return the contents of a file of weights. Raises UserError if the file is missing, truncated or edited,
    is not ebc-lab's, or does not match `sha256`, the checksum of the whole file, if that is given."""
    try:
        with opened(path) as f:
            whole = f.read()
    except FileNotFoundError:
        raise UserError(f"the weights {path} are gone: put them back, or choose another init.run.") from None
    known = hashlib.sha256(whole).hexdigest()
    if not whole.startswith(tuple(f"ebc-lab {kind}, ".encode() for kind in KINDS)):
        raise UserError(
            f"{path} holds no weights of ebc-lab: give the weights.pt or checkpoint.pt of one of its runs."
        )
    try:
        about, archive = unseal(whole)
    except ValueError as error:
        raise UserError(f"{path} is truncated or was edited ({error}): train that run again.") from None
    if about is None or about["format"] != FORMAT:
        raise UserError(f"{path} was written by another version of ebc-lab: train that run again.")
    if sha256 and known != sha256:
        raise UserError(
            f"the weights {path} have changed: their sha256 is {known[:12]}…, this run was planned with "
            f"{sha256[:12]}…; put the old file back, or begin anew."
        )
    return KeptWeights(path, known, about, archive)
