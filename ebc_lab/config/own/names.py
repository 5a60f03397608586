"""What a user's own part is called: after its function, so that its name says what it is everywhere."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection

WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
LONGEST = 40  # characters: names of arms and runs are made of it


def own_name(target: str, taken: Collection[str] = ()) -> str:
    """Return the name of a part with this target: cautious for `my_opt:Cautious`, my_adam_w2 for
    `lib.MyAdamW2`.

    `taken`: names that mean something else (choices of `conf`, other parts); instead of these it gets `_2` …
    """
    plain = unicodedata.normalize("NFKD", re.split(r"[.:]", target)[-1]).encode("ascii", "ignore").decode()
    words = re.sub(r"\W+", "_", WORDS.sub("_", plain)).strip("_").lower()
    name = re.sub("_+", "_", words)[:LONGEST] or "own"
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)
