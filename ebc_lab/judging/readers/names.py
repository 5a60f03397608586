"""The arm, the seed and the settings that people write into the names of runs, files and folders."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
POWER = r"\d+(?:\.\d+)?[eE]_\d{1,2}"  # 3e_4 is 3e-4, where a name must not hold a second hyphen
SEEDS = "random_seed|rng_seed|seed"
REPLICATES = "run|rep|repeat|replicate|trial|version|checkpoint"
# settings whose value people write without an equals sign: lr1e-3, lr_0.01, bs-32
KNOWN = (
    "learning_rate|lr|weight_decay|wd|batch_size|batch|bs|momentum|mom|beta1|beta2|eps|warmup_steps|warmup|"
    "label_smoothing|dropout|grad_clip|clip"
)
GLUED = rf"(?:(?:{SEEDS}|{REPLICATES}|{KNOWN})[_-]?(?:{POWER}|{NUMBER})|s\d+)"
# first halves of settings of two words, which an underscore would tear apart
FIRST_HALVES = (
    "random|rng|learning|weight|batch|label|grad|gradient|warmup|clip|init|max|min|num|n|hidden|lr|model"
)
KEY = rf"(?:(?:{FIRST_HALVES})_)?[A-Za-z][A-Za-z0-9.]*"
END = r"(?=$|[_\-\s,;/])"
PART = re.compile(
    rf"(?:^|(?<=[_\-\s,;/]))(?:(?P<key>{KEY})=(?P<value>{NUMBER}{END}|.+?(?=$|[,;\s/]|[_-](?:{KEY}=|{GLUED}{END})))"
    rf"|(?P<known>{SEEDS}|{REPLICATES}|{KNOWN})[_-]?(?P<number>{POWER}|{NUMBER}){END}|s(?P<seed>\d+){END})",
    re.IGNORECASE,
)
# columns of steps
STEP_NAMES = re.compile(
    r"(.*[/._])?(global_?)?(_?step|steps|iter|iters|iteration|iterations|epoch|tokens|batch_idx|update|updates|index)",
    re.IGNORECASE,
)
COUNTED = re.compile(r"(.*?)[_\-\s.]?(?<![\d.])(\d+)")


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """Return what a name says: the arm, and settings by name, `seed` among them.

    `muon-lr=0.02-s3` is the arm `muon` with lr 0.02 and seed 3. The number of a replicate (`run-3`,
    `trial_0`) is `run`. What is not written as a setting stays in the arm: `adamw8bit`, `muon_0.95`. The arm
    is empty where the name is made of settings only.
    """
    told: dict[str, str] = {}
    parts = name.split(",")
    if len(parts) > 1 and all("=" in part for part in parts):  # Hydra's names of a sweep's jobs
        for part in parts:
            key, _, value = part.strip().lstrip("+").partition("=")
            told[_called(key)] = value
        return "", told

    def taken(match: re.Match[str]) -> str:
        if match["seed"]:
            told["seed"] = match["seed"]
        else:
            value = match["value"] or re.sub("(?<=[eE])_", "-", match["number"])
            told[_called(match["key"] or match["known"])] = value
        return "\0"

    rest = PART.sub(taken, name)
    if "\0" in rest:
        pieces = (piece.strip("_- ,;/\n") for piece in rest.split("\0"))
        rest = "_".join(piece for piece in pieces if piece)
    return rest, told


def split_names(names: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return `split_name` of each, looked at together.

    A number at the end is that of a replicate (`run`) where every name ends in one, every stem has at least
    two, and they count from 0 or from 1 without a gap: `adam_0`, `adam_1`, `muon_0`, `muon_1`. With one stem,
    as in `v1`, `v2`, they could be arms.
    """
    split = [split_name(name) for name in names]
    ends = {arm: COUNTED.fullmatch(arm) for arm, _ in split}
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for match in ends.values():
        if match is None:
            return split
        numbers[match[1]].add(int(match[2]))
    gapless = (
        sorted(seen) in (list(range(len(seen))), list(range(1, len(seen) + 1))) for seen in numbers.values()
    )
    if len(numbers) < 2 or min(map(len, numbers.values())) < 2 or not all(gapless):
        return split
    counted = {arm: (match[1], match[2]) for arm, match in ends.items() if match}
    return [(counted[arm][0], {**told, "run": counted[arm][1]}) for arm, told in split]


def columns_of_places(paths: Sequence[str | Path], root: str | Path) -> pd.DataFrame:
    """Return what the places of runs say, a row a path in the order given.

    Columns: `run`, the place below `root`, without levels that are the same for all; `folder1`,
    `folder2` … and `file`, what is left of each level that differs; `seed`; and settings that differ. A level
    that is the same for all says nothing, nor does the number of a replicate. A path that lacks what others
    have holds None.
    """
    import pandas as pd

    levels = [_levels(path, root) for path in paths]
    folders = max(len(places) for places, _ in levels)
    columns: dict[str, list[str | None]] = {}
    told: list[dict[str, str]] = [{} for _ in paths]
    files = [file for _, file in levels]
    named = [
        (f"folder{n + 1}", [places[n] if n < len(places) else "" for places, _ in levels])
        for n in range(folders)
    ]
    for column, values in [*named, ("file", files)]:
        distinct = sorted(set(values))
        split = dict(zip(distinct, split_names(distinct), strict=True))
        for settings, value in zip(told, values, strict=True):
            settings.update(split[value][1])
        arms: list[str | None] = [split[value][0] or None for value in values]
        if len(set(arms)) > 1:
            columns[column] = arms
    for name in dict.fromkeys(name for settings in told for name in settings if name != "run"):
        column_of_name = [settings.get(name) for settings in told]
        if name == "seed" or len(set(column_of_name)) > 1:
            columns[name] = column_of_name
    places_of_runs = [[*places, file] for places, file in levels]
    same = {
        level
        for level in range(min(map(len, places_of_runs)))
        if len({places[level] for places in places_of_runs}) == 1
    }
    if len({len(places) for places in places_of_runs}) == 1 and len(same) < len(places_of_runs[0]):
        places_of_runs = [
            [place for level, place in enumerate(places) if level not in same] for places in places_of_runs
        ]
    runs = ["/".join(places) for places in places_of_runs]
    return pd.DataFrame({"run": runs, **columns}, dtype=object)


def _levels(path: str | Path, root: str | Path) -> tuple[list[str], str]:
    """Return the folders of a path below `root`, and its last part without endings such as `.csv.gz`."""
    parts = Path(os.path.relpath(path, root)).parts
    file = re.sub(r"(\.(csv|tsv|txt|log|out|jsonl?|ndjson|parquet|pq|gz|bz2|xz|zst))+$", "", parts[-1])
    return list(parts[:-1]), file


def _called(key: str) -> str:
    """Return a setting's name as it is called here: seeds are `seed`, replicates `run`."""
    lower = key.lower()
    if re.fullmatch(SEEDS, lower):
        return "seed"
    return "run" if re.fullmatch(REPLICATES, lower) else key
