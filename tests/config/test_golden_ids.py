"""Names of runs as they were before parts had places of their own: none may move.

`golden_ids.json` holds the choices and values to combine, and a line for each combination: eight hex digits
of its run's whole name and its arm's, and six of the sentence that refuses it, where one did. It was recorded
by `python -m tests.config.test_golden_ids`; a later choice is not drawn, so that nothing recorded moves.
"""

import functools
import hashlib
import itertools
import json
import random
from pathlib import Path

import pytest

from ebc_lab.config.checks import validate_run
from ebc_lab.config.choices import changed, groups
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import canonical_json, recorded_environment, run_id
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.spec import arm_name

GOLDEN = Path(__file__).with_name("golden_ids.json")
DRAWS = 2000
RESOLVED = {"dtype": "float32", "device": "cpu", "compile": "off", "threads_per_run": 1}
CHECKSUM = "0" * 64
ENVIRONMENT = {
    "torch": "2.13",
    "numerics_version": 4,
    "libraries": {"pytorch-optimizer": "3.12.1", "torchao": "0.18.0"},
}
ACCEPTED = "------"


@functools.cache
def golden():
    return json.loads(GOLDEN.read_text())


def chosen(group, name):
    """The settings of a choice, with what it cannot be named without."""
    if name == "custom":
        return {"name": name, "target": "my_part:make", "sha256": "1" * 64}
    return {"name": name, "sha256": CHECKSUM} if group in ("data", "tokens") else {"name": name}


def every_choice(table):
    for group, names in table["choices"].items():
        for name in names:
            yield {group: chosen(group, name)}


def every_pair(table):
    for one, other in itertools.combinations(table["choices"], 2):
        for first, second in itertools.product(table["choices"][one], table["choices"][other]):
            yield {one: chosen(one, first), other: chosen(other, second)}


def draws(table):
    """Seeded combinations of choices with some fields at another value; every second is far from the
    defaults, the others near enough that most are accepted."""
    source = random.Random(0)
    for nth in range(DRAWS):
        share, most = ((0.4, 8), (0.12, 2))[nth % 2]
        settings = {"stabilizer": chosen("stabilizer", source.choice(("none", "ebc")))}
        for group, names in table["choices"].items():
            if source.random() < share:
                settings[group] = chosen(group, source.choice(names))
        for key in source.sample(sorted(table["values"]), source.randint(0, most)):
            value = source.choice(table["values"][key])
            group, _, field = key.rpartition(".")
            if group:
                settings.setdefault(group, {})[field] = value
            else:
                settings[field] = value
        yield settings


COMBINATIONS = {"choices": every_choice, "pairs": every_pair, "draws": draws}


def short(text, digits):
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def named_and_refused(settings):
    """What the run and its arm are called, and the sentence that refuses them, or None."""
    whole = {"data": chosen("data", "auto"), **RESOLVED, **settings}
    whole["data"] = {"sha256": CHECKSUM, **whole["data"]}
    whole["budget"] = {"stretch": None, **whole.get("budget", {})}  # as it was before there was one
    run = changed(RunConfig(), whole)
    names = f"{run_id('train', run)} {arm_name(run, 2.0)}"
    try:
        validate_run(run)
    except UserError as error:
        return names, str(error)
    return names, None


def recorded(kind, table, every=1):
    """(settings, digits of the names, digits of the refusal, both in words) of each combination, or of one in
    `every`; digits are None of a part that is no longer there."""
    gone = set(table["choices"]) - set(groups())
    with recorded_environment(ENVIRONMENT):
        for settings in itertools.islice(COMBINATIONS[kind](table), None, None, every):
            if gone & set(settings):
                yield settings, None, None, None
                continue
            names, refusal = named_and_refused(settings)
            refused = ACCEPTED if refusal is None else short(refusal, 6)
            yield settings, short(names, 8), refused, (names, refusal)


# one pair in seven meets every choice; the draws hold 4,141 of all 4,284, some refused for another cause
@pytest.mark.parametrize(
    ("kind", "every"),
    [("choices", 1), ("draws", 1), ("pairs", 7), pytest.param("pairs", 1, marks=pytest.mark.thorough)],
)
def test_no_run_has_another_name_or_is_refused_with_another_sentence(kind, every):
    lines = golden()["lines"][kind].split()[::every]
    moved = []
    for line, (settings, name, refused, words) in zip(lines, recorded(kind, golden(), every), strict=True):
        if name and line != name + refused:
            moved.append((canonical_json(settings), line, words))
    assert not moved, f"{len(moved)} of {len(lines)} moved, the first: {moved[0]}"


def write():
    """Record the names of the combinations as they are now."""
    table = golden()
    lines = {}
    for kind in COMBINATIONS:
        lines[kind] = " ".join(name + refused for _, name, refused, _ in recorded(kind, table))
    GOLDEN.write_text(json.dumps({**table, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    write()
