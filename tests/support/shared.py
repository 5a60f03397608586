"""What takes seconds to make is made once for all processes that run tests."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Made = TypeVar("Made")


def made_once(shared: Path, name: str, make: Callable[[Path], Made]) -> Made:
    """What `make` returned of a folder of its own, from the first process that asked for it by this name.

    Every later one waits for it and gets its own copy. Files in the folder are the same for all: nobody may
    change them.
    """
    folder = shared / name
    result = shared / f"{name}.pickle"
    shared.mkdir(parents=True, exist_ok=True)
    with FileLock(shared / f"{name}.lock"):
        if not result.exists():
            folder.mkdir()
            made = make(folder)
            result.write_bytes(pickle.dumps(made))
    return pickle.loads(result.read_bytes())
