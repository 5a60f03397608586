"""Arms of many studies, ranked among those with the same corpus, model, batch and length."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebc_lab.config.errors import UserError
from ebc_lab.records.columns import BOARD_MEANINGS
from ebc_lab.study.stages.compare_arms import losses
from ebc_lab.study.stages.stage import decision_that_shows
from ebc_lab.study.stages.statistics import paired
from ebc_lab.study.store.bundle import SUFFIX, is_bundle
from ebc_lab.study.store.find import no_study_in, place_of
from ebc_lab.study.store.study import Study

from .catalogue import places
from .frames import frame
from .loaded import OUTPUT_DIR, LoadedStudy, load
from .tables import lost

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[tuple[str, str], ...]  # what runs must have in common to be ranked: its name, in words
Losses = dict[str, float]  # seed -> test loss, infinite where the run diverged


@dataclass(frozen=True)
class Entry:
    """An arm of a study's last stage."""

    study: str
    track: str
    arm: str
    lr: float
    key: Key
    environment: str  # torch and numerics, in words
    losses: Losses
    runs: frozenset[str]  # their names


@dataclass(frozen=True)
class Board:
    """The ranking.

    Attributes:
        table: one row an arm, best first within its group.
        groups: name of a group -> what its arms have in common, in words.
        notes: what could not be compared, or only with care, and why: a sentence each.
    """

    table: pd.DataFrame
    groups: dict[str, str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the ranking as JSON values, with None for what is not known."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {"groups": self.groups, "arms": rows, "notes": self.notes}

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{escape(line)}</p>" for line in (*self._about(), *self.notes))
        return f"<div>{self.table.to_html(index=False, escape=True, na_rep='–')}{lines}</div>"

    def __repr__(self) -> str:
        return "\n".join([self.table.to_string(index=False), *self._about(), *self.notes])

    def _about(self) -> list[str]:
        return [f"{name}: {about}" for name, about in self.groups.items()]


def board(*folders: str | os.PathLike[str]) -> Board:
    """Return the arms of studies and bundles, ranked by mean test loss. Each of `folders` is a folder of
    studies, or the folder or name of one study; by default, it is the output folder.

    Raises UserError if there is no study.
    """
    notes: list[str] = []
    entries: list[Entry] = []
    seen: dict[tuple[str, str], str] = {}  # which study, and since when -> where it was found
    everything = [place for folder in folders or (OUTPUT_DIR,) for place in _studies(str(folder))]
    for place in everything:
        try:
            study = load(f"{place.parent}{os.sep}{place.name}")
            which = (study.header["study"], study.header["created"])
            if which in seen:
                notes.append(f"{place.name} is the study {seen[which]} once more, and counts once.")
                continue
            seen[which] = place.name
            arms = list(_entries(study))
        except UserError as error:
            notes.append(f"{place.name} is left out: {error}")
            continue
        with study.blame_files():
            notes += [f"{study.name}: {line}" for line in lost(study.decisions)]
        if not arms:
            why = next(iter(study.problems), "no arm of it has been judged on the test split yet.")
            notes.append(f"{place.name} is left out: {why}")
        entries += arms
    return _ranked(entries, notes)


def _studies(name: str) -> list[Path]:
    """Return the paths of the studies in the folder `name`, or of the one study that `name` stands for.
    Raises UserError if there is none."""
    folder = Path(name).expanduser()
    if folder.suffix != SUFFIX and not Study(folder).exists() and (studies := places(folder)):
        return studies
    one = place_of(name, OUTPUT_DIR, lambda text: None)
    if is_bundle(one) or Study(one).exists():
        return [one]
    if folder.is_dir() or folder == Path(OUTPUT_DIR):
        raise UserError(no_study_in(folder))
    Study(one).must_exist()
    return [one]


def _entries(study: LoadedStudy) -> Iterator[Entry]:
    """Yield the arms of the finals or of a suite that have a result on the test split."""
    decided = decision_that_shows("verdict", study.decisions) or decision_that_shows("arms", study.decisions)
    results = study.results()
    specs = study.specs()
    with study.blame_files():
        for track, decided_track in (decided or {"tracks": {}})["tracks"].items():
            for label, arm in decided_track["arms"].items():
                by_seed = losses(arm, results)
                run = next((specs[run_id] for run_id in arm["runs"].values() if run_id in specs), None)
                if by_seed and run is not None:
                    key, environment = _key(study, run), _environment(study)
                    runs = frozenset(arm["runs"].values())
                    yield Entry(study.name, track, label, float(arm["lr"]), key, environment, by_seed, runs)


def _key(study: LoadedStudy, run: Mapping[str, Any]) -> Key:
    """Return what runs must have in common to be ranked together, in words: text, tokens, workload, model,
    batch and length."""
    corpus = study.header["corpus"]
    workload = run.get("workload", {"name": "gpt"})
    parts = {"ebm": run.get("ebm"), "encoder": run.get("encoder"), "decoder": run.get("decoder")}
    tokens = run.get("tokens", {"name": "characters"})
    return (
        ("corpus", f"{corpus['title']} ({str(corpus['sha256'])[:8]})"),
        ("tokens", "characters" if tokens["name"] == "characters" else _words(tokens)),
        ("workload", "gpt" if workload["name"] == "gpt" else _words({**workload, **parts})),
        ("model", _words(run["model"])),
        ("batch", f"{run['batch_size'] * run.get('accumulate', 1)}×{run['model']['context']}"),
        ("steps", str(run["steps"])),
    )


def _words(settings: Mapping[str, Any]) -> str:
    """Return the settings of a part in words, such as `gpt, blocks 3, width 128`."""
    others = {
        name: value for name, value in settings.items() if name != "name" and value not in (None, {}, "")
    }
    rest = [f"{name} {value}" for name, value in others.items()]
    return ", ".join([str(settings.get("name", "")), *rest]).strip(", ")


def _environment(study: LoadedStudy) -> str:
    versions = study.header["environment"]
    return f"torch {versions.get('torch')}, numerics {versions.get('numerics_version')}"


def _ranked(entries: Sequence[Entry], notes: list[str]) -> Board:
    """Return the board of these entries, whose notes say what differs between groups and within them."""
    groups: dict[Key, list[Entry]] = {}
    for entry in _merged(entries):
        groups.setdefault(entry.key, []).append(entry)
    ordered = sorted(groups.values(), key=len, reverse=True)
    rows: list[dict[str, Any]] = []
    about: dict[str, str] = {}
    for i, group in enumerate(ordered):
        name = chr(ord("A") + i) if i < 26 else f"G{i + 1}"
        about[name] = "; ".join(f"{what} {value}" for what, value in group[0].key)
        rows += _rows(name, group)
        if i:
            notes.append(f"group {name} is not ranked with A: {_apart(group[0].key, ordered[0][0].key)}.")
        if len(places := sorted({entry.environment for entry in group})) > 1:
            where = " and ".join(places)
            notes.append(f"group {name} was trained by {where}: losses may differ by more than the seeds'.")
        shared = set(group[0].losses).intersection(*(entry.losses for entry in group))
        every = set().union(*(entry.losses for entry in group))
        if shared != every:
            notes.append(f"the arms of group {name} share {len(shared)} of {len(every)} seeds.")
    return Board(frame(rows, BOARD_MEANINGS), about, notes)


def _merged(entries: Sequence[Entry]) -> list[Entry]:
    """Return each arm once. An arm whose runs were copied to another study names both studies."""
    merged: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        which = (entry.key, entry.environment, entry.arm, entry.runs, *sorted(entry.losses.items()))
        if known := merged.get(which):
            entry = replace(known, study=f"{known.study}, {entry.study}")
        merged[which] = entry
    return list(merged.values())


def _apart(key: Key, other: Key) -> str:
    """Return how two groups differ, such as `batch 16×64 against 24×32`."""
    pairs = zip(key, other, strict=True)
    return "; ".join(
        f"{what} {value} against {theirs}" for (what, value), (_, theirs) in pairs if value != theirs
    )


def _rows(name: str, entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a group's arms, best first, each compared with the best."""
    alone = {
        id(e): paired(e.losses, dict.fromkeys(e.losses, 0.0)) for e in entries
    }  # the mean's own interval

    def place(entry: Entry) -> tuple[bool, float]:
        mean = alone[id(entry)]
        if mean["mean"] is not None:
            return False, mean["mean"]
        return True, float("inf") if mean["median"] is None else float(mean["median"])

    ordered = sorted(entries, key=place)
    best = ordered[0]
    for rank, entry in enumerate(ordered, 1):
        mean = alone[id(entry)]
        against: Mapping[str, Any] = paired(entry.losses, best.losses) if entry is not best else {}
        yield {
            "group": name,
            "rank": rank,
            "arm": entry.arm,
            "study": entry.study,
            "track": entry.track,
            "test_loss": mean["mean"],
            "low": mean["low"] if mean["mean"] is not None else None,
            "high": mean["high"] if mean["mean"] is not None else None,
            "seeds": len(entry.losses),
            "diverged": mean.get("diverged", {}).get("arm", 0),
            "lr": entry.lr,
            "shared_seeds": against.get("seeds", len(entry.losses)),
            "difference": against.get("mean"),
            "difference_low": against.get("low"),
            "difference_high": against.get("high"),
        }
