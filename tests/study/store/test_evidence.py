"""The recorded studies of docs/evidence: sound, and their decisions follow from their results."""

from pathlib import Path

import pytest

from ebc_lab.study.store.bundle import unpack
from ebc_lab.study.store.replay import replay
from ebc_lab.study.store.verify import verify

EVIDENCE = sorted(Path(__file__).parents[3].glob("docs/evidence/*.zip"))


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_a_recorded_study_is_sound_and_its_decisions_follow_from_its_results(path, tmp_path):
    study = unpack(path, tmp_path / path.stem)
    assert verify(study)["ok"]
    assert replay(study)["same"]
