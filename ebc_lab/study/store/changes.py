"""The settings in which a command differs from the recorded study, and descriptions of them for users."""

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
from ebc_lab.config.schema import NOT_THE_STUDY, STAGES, Config
from ebc_lab.records.figures import FINISHED

from ..stages.statistics import level
from .study import EarlierAnswer, Record

Change = tuple[str, Any, Any]  # dotted path of a setting, its value in study.json, its value now
MOST = 5  # changes described one by one in a summary
LONGEST = 60  # characters shown of a value
# no run and no comparison depends on these
TEXT = re.compile(r"ablation\.(question|arms\.[^.]+\.about)|profiles\.mine\..+")


def requested(config: Config) -> dict[str, Any]:
    """Return the settings that define a study, as the command gave them, before they are resolved."""
    asked = {k: v for k, v in to_dict(config).items() if k not in NOT_THE_STUDY}
    return {**asked, "study": study_part(config)}


def differences(old: Any, new: Any, path: str = "") -> list[Change]:
    """Return (dotted path, old value, new value) for every setting that differs. A setting that is missing
    equals None and an empty mapping, because an older version may not have had the setting."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    unsaid: tuple[Any, ...] = (None, {})
    return [] if old == new or (old in unsaid and new in unsaid) else [(path, old, new)]


def from_recorded(config: Config, known: Mapping[str, Any]) -> list[Change]:
    """Return the settings in which the command's `config` differs from `known`, the study.json."""
    later = later_stages(known["requested"])
    asked, old = (
        {key: value for key, value in settings.items() if key not in later}
        for settings in (requested(config), as_this_version_says(known["requested"]))
    )
    return differences({**old, "data": asked["data"]} if same_corpus(config.data, known) else old, asked)


def later_stages(*recorded: Mapping[str, Any]) -> set[str]:
    """Return the stages that came with a version later than the one that recorded some of these settings. A
    study that has such a stage is told apart by `study.stages`; in others nothing reads its settings."""
    return {stage for stage in STAGES if any(stage not in settings for settings in recorded)}


def as_this_version_says(old: dict[str, Any]) -> dict[str, Any]:
    """Return the settings recorded by an older version. Any that it lacked are added, with the values that
    reproduce its behaviour. If this version cannot read the recorded settings, return `old` unchanged."""
    try:
        return requested(from_dict(Config, old))
    except UserError:
        return old


def same_corpus(data: DataConfig, known: Mapping[str, Any]) -> bool:
    """Return whether `data` asks for the corpus that the study was started with, used in the same way. `auto`
    stands for the corpus that the study found. Shards may lie elsewhere, since their checksum is enforced."""
    now, asked, found = to_dict(data), known["requested"]["data"], known["config"]["data"]
    named = {now["name"], asked.get("name")} <= {"auto", found.get("name")}
    same_file = now["file"] == asked.get("file")
    same_use = all(now[key] == asked.get(key, now[key]) for key in now if key not in SAME_TEXT)
    same_text = named and same_file and now["sha256"] in (None, found.get("sha256"))
    return same_use and (now == asked or same_text)


def describe_earlier_looks(header: Mapping[str, Any]) -> str:
    """Return a caveat about a study's answer if earlier answers exist, and an empty string otherwise."""
    caveats = []
    # recorded by an earlier version, which did not correct the intervals for this
    if had := ", then ".join(map(str, header.get("looks", []))):
        caveats.append(
            f"the seeds were changed after an answer had been seen (of {had} seeds); intervals hold for "
            "seeds chosen beforehand, so these claim a difference somewhat too often"
        )
    again = [answer for answer in header.get("earlier", []) if answer["shared"]]
    if by := header["config"].get("answered_before", 0):
        once = ", then ".join(f"{_source(answer)}, {len(answer['shared'])} of them here" for answer in again)
        caveats.append(
            f"seeds were judged again after an answer had been seen ({once or had}), so the error of the "
            f"intervals is divided by {2**by}: {level([{'looks': 2**by}])} instead of 95%"
        )
    if fresh := [answer for answer in header.get("earlier", []) if not answer["shared"]]:
        others = ", then ".join(map(_source, fresh))
        caveats.append(
            f"the same had been asked before of other seeds ({others}); this answer rests on none of those "
            "and holds by itself, but each one more is another chance of a false claim: count them all"
        )
    return "; ".join(caveats)


def _source(answer: EarlierAnswer) -> str:
    return f"{answer['study']}, {len(answer['seeds'])} seeds"


def looks_of(header: Mapping[str, Any]) -> list[int]:
    """Return the number of seeds of each earlier answer that shares seeds with the study."""
    again = [len(answer["seeds"]) for answer in header.get("earlier", []) if answer["shared"]]
    return [*header.get("looks", []), *again]


def refused(changes: Iterable[Change], asked: Mapping[str, Any], records: Sequence[Record]) -> list[Change]:
    """Return the changes that need --force. These are all changes except edits to explanatory texts, and
    edits to a part defined by the user if no finished run has used the recorded version of the part. `asked`:
    the settings now; `records`: the study's runs."""
    needy = []
    for change in changes:
        key, old, _ = change
        if TEXT.fullmatch(key):
            continue
        if is_edit(change, asked):
            group = key.split(".")[-2]
            # an unreadable run may have finished
            if not any(record.problem or has_finished(record, group, old) for record in records):
                continue
        needy.append(change)
    return needy


def is_edit(change: Change, asked: Mapping[str, Any]) -> bool:
    """Return whether a change consists only of an edit to the file of a part defined by the user."""
    key, old, new = change
    return bool(key.endswith(".sha256") and old and new and _part(asked, key).get("target"))


def _part(asked: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the settings of the part that contains the setting `key`; an empty mapping if no part does."""
    names = key.split(".")[:-1]
    part_of: Any = functools.reduce(lambda part, name: part.get(name, {}), names, asked)
    return part_of if isinstance(part_of, Mapping) else {}


def has_finished(record: Record, group: str, sha256: str) -> bool:
    """Return whether the run has finished and its part in `group` was the file with this checksum."""
    if record.brief.outcome not in FINISHED or (spec := record.spec) is None:
        return False
    return bool(spec["config"].get(group, {}).get("sha256") == sha256)


def pinned(records: Sequence[Record], run_id: str) -> str:
    """Return the clause about --force for the end of a failed run's remedy. The clause is empty unless the
    run uses a part defined by the user, and other runs have finished with the same file of this part."""
    spec = next((record.spec for record in records if record.run_id == run_id), None)
    config: Mapping[str, Any] = spec["config"] if spec else {}
    parts = [(group, config[group]) for group in OWN_GROUPS if config.get(group, {}).get("sha256")]
    for group, part in parts:
        if any(has_finished(record, group, part["sha256"]) for record in records):
            return f", with --force where you edit {part['target']}, since other runs of it have finished"
    return ""


def summarize(changes: Sequence[Change], asked: Mapping[str, Any], edited: Sequence[str]) -> str:
    """Return a one-line summary that describes at most MOST changes, such as
    `mine: first → sign_sgd; arm hot is new; seeds: [0, 1] → [0]; and 3 more`."""
    lines = describe(changes, asked, edited)
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return "; ".join([*lines[:MOST], *more])


def describe(changes: Sequence[Change], asked: Mapping[str, Any], edited: Sequence[str]) -> list[str]:
    """Return a description of each change; those of whole arms come first. `edited`: names of the user's own
    files that have changed since the study copied them."""
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
