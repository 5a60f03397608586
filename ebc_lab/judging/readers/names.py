"""The arm, the seed and the settings that people write into the names of runs, files and folders."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

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
# columns of arms, and of steps
ARM_NAMES = {"arm", "optimizer", "optim", "opt", "method", "algorithm", "algo", "variant", "group"}
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
    settings: dict[str, str] = {}
    parts = name.split(",")
    if len(parts) > 1 and all("=" in part for part in parts):  # Hydra's names of a sweep's jobs
        for part in parts:
            key, _, value = part.strip().lstrip("+").partition("=")
            settings[_called(key)] = value
        return "", settings

    def taken(match: re.Match[str]) -> str:
        if match["seed"]:
            settings["seed"] = match["seed"]
        else:
            value = match["value"] or re.sub("(?<=[eE])_", "-", match["number"])
            settings[_called(match["key"] or match["known"])] = value
        return "\0"

    rest = PART.sub(taken, name)
    if "\0" in rest:
        pieces = (piece.strip("_- ,;/\n") for piece in rest.split("\0"))
        rest = "_".join(piece for piece in pieces if piece)
    return rest, settings


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
    return [(counted[arm][0], {**settings, "run": counted[arm][1]}) for arm, settings in split]


def columns_of_places(paths: Sequence[str | Path], root: str | Path) -> pd.DataFrame:
    """Return what the places of runs say, a row a path in the order given.

    Columns: `run`, the place below `root`, without levels that are the same for all; `folder1`,
    `folder2` … and `file`, what is left of each level that differs; `seed`; and settings that differ. A level
    that is the same for all says nothing, nor does the number of a replicate. A path that lacks what others
    have holds None.
    """
    parts = [_parts(path, root) for path in paths]
    deepest = max(map(len, parts)) - 1
    levels = {
        f"folder{n + 1}": [each[n] if n < len(each) - 1 else "" for each in parts] for n in range(deepest)
    }
    levels["file"] = [each[-1] for each in parts]
    columns: dict[str, list[str | None]] = {}
    settings: list[dict[str, str]] = [{} for _ in paths]
    for level, names in levels.items():
        distinct = sorted(set(names))
        split = dict(zip(distinct, split_names(distinct), strict=True))
        for own, name in zip(settings, names, strict=True):
            own.update(split[name][1])
        arms = [split[name][0] or None for name in names]
        if len(set(arms)) > 1:
            columns[level] = arms
    for setting in dict.fromkeys(name for own in settings for name in own if name != "run"):
        values = [own.get(setting) for own in settings]
        if setting == "seed" or len(set(values)) > 1:
            columns[setting] = values
    alike = len(set(map(len, parts))) == 1
    differing = [n for n in range(len(parts[0])) if alike and len({each[n] for each in parts}) > 1]
    runs = ["/".join([each[n] for n in differing] or each) for each in parts]
    return pd.DataFrame({"run": runs, **columns}, dtype=object)


def _parts(path: str | Path, root: str | Path) -> list[str]:
    """Return the folders of a path below `root`, and its last part without endings such as `.csv.gz`."""
    *folders, file = Path(os.path.relpath(path, root)).parts
    return [*folders, re.sub(r"(\.(csv|tsv|txt|log|out|jsonl?|ndjson|parquet|pq|gz|bz2|xz|zst))+$", "", file)]


def _called(key: str) -> str:
    """Return a setting's name as it is called here: seeds are `seed`, replicates `run`."""
    lower = key.lower()
    if re.fullmatch(SEEDS, lower):
        return "seed"
    return "run" if re.fullmatch(REPLICATES, lower) else key
