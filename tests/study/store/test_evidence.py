"""The recorded studies of docs/evidence: sound, and their decisions follow from their results."""

from pathlib import Path

import pytest

from ebc_lab.study.store import bundle
from ebc_lab.study.store.find import find
from ebc_lab.study.store.replay import replay

EVIDENCE = sorted(Path(__file__).parents[3].glob("docs/evidence/*.zip"))


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_a_recorded_study_is_sound_and_its_decisions_follow_from_its_results(path):
    assert bundle.verify(path)["ok"]
    assert replay(find(str(path), "nowhere"))["same"]
