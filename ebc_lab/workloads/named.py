"""The files and folders that settings name, by paths, patterns and folders. No torch and no numpy here."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ebc_lab.config.errors import HIDDEN, UserError, require
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.paths import matching_paths
from ebc_lab.records.weights import find_weights

ENDING = ".txt"  # of the files for which a folder of texts stands
TEXTS = f"give a UTF-8 text, a folder of {ENDING} files, or a pattern such as 'texts/*.md'"
SHARDS = "give the shards' folder, or fetch them first (docs/workloads.md says how)"


def named_files(setting: str, named: str | Sequence[str] | None) -> list[Path]:
    """Return the files that a setting such as `data.file` names by paths and patterns, links resolved, each
    pattern's in the order of their names. A folder of texts stands for its .txt files and those below it.

    Raises UserError for what is not there, what is no file, and a file that is named twice. One to which
    several links of a folder lead is named once.
    """
    of_texts = setting.endswith(".file")
    files: list[Path] = []
    for pattern in [named] if isinstance(named, str) else named or ():
        require(bool(pattern), f"{setting} holds an empty name: {TEXTS if of_texts else SHARDS}.")
        found = [file for path in matching_paths(pattern) for file in _files_of(path, of_texts)]
        if not found:
            folder = os.path.isdir(os.path.expanduser(pattern))
            what = "names no file" if glob.has_magic(pattern) else "does not exist"
            what = f"is a folder without a {ENDING} file in it or below it" if folder else what
            raise UserError(f"{setting}={pattern} {what}: {TEXTS if of_texts else SHARDS}.")
        try:
            files += dict.fromkeys(path.resolve() for path in found)
        except (OSError, RuntimeError):
            raise UserError(
                f"{setting}={pattern} holds a link that leads back to itself: remove it."
            ) from None
    for path, times in Counter(files).items():
        hidden = HIDDEN.search(str(path)) or set("\t\n") & set(str(path))
        require(not hidden, f"{setting}={path}: its name holds control characters: rename it.")
        require(path.is_file(), f"{setting}={path} is not a file: {TEXTS if of_texts else SHARDS}.")
        require(times == 1, f"{setting} names {path} twice: a file is read once.")
    return files


def _files_of(path: Path, of_texts: bool) -> list[Path]:
    """Return the files for which a path stands: those of a folder of texts, or the path itself."""
    below = matching_paths(path / "**" / f"*{ENDING}") if of_texts and path.is_dir() else [path]
    return [one for one in below if one == path or one.is_file()]


def anchored(named: str | list[str] | None) -> str | list[str] | None:
    """Return the value of `data.file` with absolute paths, so that it means the same from any folder."""
    if not isinstance(named, str):
        return named and [os.path.abspath(os.path.expanduser(one)) for one in named]
    path = Path(named).expanduser()
    return str(path.resolve() if path.is_file() else path.absolute())


def refuse_missing(run: RunConfig, folders: Sequence[Path] = ()) -> None:
    """Raise UserError where a file or folder that a setting of the run names is not there.

    `folders`: where `init.run` is looked for, too. What the files hold is looked at when the run begins.
    """
    init = InitConfig.from_run(run)
    for setting, named in {
        "data.file": run.data.file,
        "data.files": run.data.files,
        "data.val_files": run.data.val_files,
        "init.file": init.file,
    }.items():
        named_files(setting, named)
    for setting, folder in {"tokens.folder": run.tokens.folder, "ebm.gpt2": run.ebm.gpt2}.items():
        there = folder is None or os.path.isdir(os.path.expanduser(folder))
        require(there, f"{setting}={folder} is not a folder: name the one with GPT-2's files.")
    if init.name == "run":
        find_weights(init.run or "", folders)
