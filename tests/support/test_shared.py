"""What many tests rest on, and would hide faults if it were wrong."""

import itertools
import json
import os
import subprocess
import sys

import pytest
from support.composed import composed_once, conf_read_once
from support.pairwise import pairwise

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import to_dict

ASKED = [
    ["scale=smoke", "output_dir=/tmp/x-y", "study.name=done"],
    ["scale=smoke", "study=optimizers", "optimizer.lr=0.5", "study.name=1e3"],
    ["scale=laptop", "study.name=n1", "study.name=n2", "~ablation.arms.x"],
]


def outcome(overrides):
    try:
        return to_dict(compose(overrides))
    except Exception as error:
        return repr(error)


@pytest.mark.thorough
def test_a_remembered_composition_is_that_of_a_process_that_remembers_none():
    with composed_once(), conf_read_once():
        remembered = [[outcome(overrides) for overrides in ASKED] for _ in range(2)]
    program = "import json\nfrom support.test_shared import *\nprint(json.dumps(list(map(outcome, ASKED))))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    alone = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    assert remembered == [json.loads(alone.stdout)] * 2


@pytest.mark.parametrize("columns", [("ab", "xyz"), ("abcdefghi", "ABCDEFGHIJK", "xyz")])
def test_each_pair_occurs_in_a_pairwise_table_and_most_combinations_do_not(columns):
    rows = pairwise(*columns)
    for (i, one), (j, other) in itertools.combinations(enumerate(columns), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))
    largest, second = sorted((len(column) for column in columns), reverse=True)[:2]
    assert largest * second <= len(rows) <= 1.2 * largest * second
