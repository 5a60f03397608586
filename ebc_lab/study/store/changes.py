"""The settings by which a study differs from the one that is recorded, and how they are described."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ebc_lab.config.choices import OWN_GROUPS
from ebc_lab.config.dicts import from_dict, study_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.overrides import ARM
from ebc_lab.config.parts.data import SAME_TEXT, DataConfig
from ebc_lab.config.schema import NOT_THE_STUDY, Config
from ebc_lab.records.figures import FINISHED

from ..stages.statistics import level
from .study import EarlierAnswer, Record

Change = tuple[str, Any, Any]  # dotted path, in study.json, now
MOST = 5  # changes that are described one by one
LONGEST = 60  # characters of a value
TEXT = re.compile(r"ablation\.(question|arms\.[^.]+\.about)")  # on which no run and no comparison depends


def requested(config: Config) -> dict[str, Any]:
    """Return the settings that make a study what it is, as its command gave them."""
    asked = {k: v for k, v in to_dict(config).items() if k not in NOT_THE_STUDY}
    return {**asked, "study": study_part(config)}


def differences(old: Any, new: Any, path: str = "") -> list[Change]:
    """Return (dotted path, old, new) of every setting that differs. A setting that is None, or an empty
    mapping, is the same as one that is missing, because an older version did not have it."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    unsaid: tuple[Any, ...] = (None, {})
    return [] if old == new or (old in unsaid and new in unsaid) else [(path, old, new)]


def from_recorded(config: Config, known: Mapping[str, Any]) -> list[Change]:
    """Return the settings of a call that differ from those in study.json (`known`)."""
    asked = requested(config)
    old = as_this_version_says(known["requested"])
    return differences({**old, "data": asked["data"]} if same_corpus(config.data, known) else old, asked)


def as_this_version_says(old: dict[str, Any]) -> dict[str, Any]:
    """Return recorded settings together with those that an older version did not have, at the values that
    stand for what it did. Where this version does not know one of them, they are returned as they are."""
    try:
        return requested(from_dict(Config, old))
    except UserError:
        return old


def same_corpus(data: DataConfig, known: Mapping[str, Any]) -> bool:
    """Return whether a call means the corpus that the study has, used in the same way. `auto` means the one
    that it found; shards may lie elsewhere by now, because their checksum is enforced."""
    now, asked, found = to_dict(data), known["requested"]["data"], known["config"]["data"]
    named = {now["name"], asked.get("name")} <= {"auto", found.get("name")}
    same_file = now["file"] == asked.get("file")
    same_use = all(now[key] == asked.get(key, now[key]) for key in now if key not in SAME_TEXT)
    same_text = named and same_file and now["sha256"] in (None, found.get("sha256"))
    return same_use and (now == asked or same_text)


def describe_earlier_looks(header: Mapping[str, Any]) -> str:
    """Return what a reader must know of a study's answer where others came before it; else an empty text."""
    said = []
    # by an earlier version, which corrected none
    if had := ", then ".join(map(str, header.get("looks", []))):
        said.append(
            f"the seeds were changed after an answer had been seen (of {had} seeds); intervals hold for "
            "seeds chosen beforehand, so these claim a difference somewhat too often"
        )
    again = [answer for answer in header.get("earlier", []) if answer["shared"]]
    if by := header["config"].get("answered_before", 0):
        once = ", then ".join(f"{_source(answer)}, {len(answer['shared'])} of them here" for answer in again)
        said.append(
            f"seeds were judged again after an answer had been seen ({once or had}), so the error of the "
            f"intervals is divided by {2**by}: {level([{'looks': 2**by}])} instead of 95%"
        )
    if fresh := [answer for answer in header.get("earlier", []) if not answer["shared"]]:
        others = ", then ".join(map(_source, fresh))
        said.append(
            f"the same had been asked before of other seeds ({others}); this answer rests on none of those "
            "and holds by itself, but each one more is another chance of a false claim: count them all"
        )
    return "; ".join(said)


def _source(answer: EarlierAnswer) -> str:
    return f"{answer['study']}, {len(answer['seeds'])} seeds"


def looks_of(header: Mapping[str, Any]) -> list[int]:
    """Return how many seeds each earlier answer had that shares some with the study."""
    again = [len(answer["seeds"]) for answer in header.get("earlier", []) if answer["shared"]]
    return [*header.get("looks", []), *again]


def refused(changes: Iterable[Change], asked: Mapping[str, Any], records: Sequence[Record]) -> list[Change]:
    """Return the changes that need --force: all but those of texts, and the edit of a part of one's own of
    which no run has finished. `asked`: the settings now; `records`: the study's runs."""
    needy = []
    for change in changes:
        key, old, _ = change
        if TEXT.fullmatch(key):
            continue
        if is_edit(change, asked):
            group = key.split(".")[-2]
            # a run that cannot be read may have finished
            if not any(record.problem or has_finished(record, group, old) for record in records):
                continue
        needy.append(change)
    return needy


def is_edit(change: Change, asked: Mapping[str, Any]) -> bool:
    """Return whether a change is that of the file of a part of one's own, and of nothing else."""
    key, old, new = change
    return bool(key.endswith(".sha256") and old and new and _part(asked, key).get("target"))


def _part(asked: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the settings of the part to which the setting `key` belongs."""
    names = key.split(".")[:-1]
    part_of: Any = functools.reduce(lambda part, name: part.get(name, {}), names, asked)
    return part_of if isinstance(part_of, Mapping) else {}


def has_finished(record: Record, group: str, sha256: str) -> bool:
    """Return whether a run has finished that has this part, by the checksum of its file."""
    if record.brief.outcome not in FINISHED or (spec := record.spec) is None:
        return False
    return bool(spec["config"].get(group, {}).get("sha256") == sha256)


def pinned(records: Sequence[Record], run_id: str) -> str:
    """Return the end of a remedy, for somebody who mends a part of this run with which other runs have
    finished; else an empty text."""
    spec = next((record.spec for record in records if record.run_id == run_id), None)
    config: Mapping[str, Any] = spec["config"] if spec else {}
    parts = [(group, config[group]) for group in OWN_GROUPS if config.get(group, {}).get("sha256")]
    for group, part in parts:
        if any(has_finished(record, group, part["sha256"]) for record in records):
            return f", with --force where you edit {part['target']}, since other runs of it have finished"
    return ""


def summarize(changes: Sequence[Change], asked: Mapping[str, Any], edited: Sequence[str]) -> str:
    """Return `mine: first → sign_sgd; arm hot is new; seeds: [0, 1] → [0]; and 3 more`."""
    lines = describe(changes, asked, edited)
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return "; ".join([*lines[:MOST], *more])


def describe(changes: Sequence[Change], asked: Mapping[str, Any], edited: Sequence[str]) -> list[str]:
    """Return a description of each change, those of whole arms first. `edited`: the files of one's own that
    were changed since."""
    swapped, lines = set(), []
    for key, old, new in changes:
        if key == "ablation.mine.arms":
            before, now = old or [], new or []
            lines.append(f"mine: {', '.join(before) or 'none'} → {', '.join(now) or 'none'}")
            swapped |= {"mine", key, *(f"ablation.arms.{name}" for name in {*before, *now})}
    left = [change for change in changes if change[0] not in swapped]
    of_arms = [change for change in left if ARM.fullmatch(change[0]) and None in change[1:]]
    for key, old, _ in of_arms:
        name = key.rpartition(".")[2]
        lines.append(f"arm {name} is new" if old is None else f"arm {name} is no longer given")
    for change in (change for change in left if change not in of_arms):
        key, old, new = change
        if is_edit(change, asked):
            files = ", ".join(edited) or f"the file of {_part(asked, key)['target']}"
            lines.append(f"{files} was edited since")
        else:
            lines.append(f"{key}: {_short(old)} → {_short(new)}")
    return list(dict.fromkeys(lines))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
