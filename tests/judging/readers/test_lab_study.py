"""The lab's own studies, as runs of somebody."""

import math
import zipfile

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import lab_study
from ebc_lab.results import load
from ebc_lab.study.store.bundle import export


@pytest.fixture(scope="module")
def study(finished):
    return finished[1].study


def test_the_finals_are_read_with_their_seeds_and_final_losses(study):
    assert lab_study.claims(study.root)
    source = lab_study.read(study.root, Asked())
    frame, results = source.frame, load(study.root).results()
    ends = frame.groupby("run", sort=False).last()
    for run, end in ends.iterrows():
        if results[run]["outcome"] == "completed":
            assert (end.val_loss, end.test_loss) == (results[run]["val_loss"], results[run]["test_loss"])
        else:
            assert end.val_loss == end.test_loss == math.inf
    arms = frame.groupby("arm").seed.agg(set)
    assert len(arms) > 1
    assert all(seeds == arms.iloc[0] for seeds in arms)  # the same in every arm: paired
    assert frame.groupby("run").step.is_monotonic_increasing.all()
    assert not frame.duplicated(["run", "step"]).any()
    assert "runs of other stages were not" in " ".join(source.notes)


def test_a_bundle_says_the_same(study, tmp_path):
    bundle = tmp_path / "study.zip"
    export(study, bundle)
    assert lab_study.claims(bundle)
    assert lab_study.read(bundle, Asked()).frame.equals(lab_study.read(study.root, Asked()).frame)


def test_other_folders_and_archives_are_not_claimed(tmp_path):
    (tmp_path / "a.zip").write_text("no archive")
    member = zipfile.ZipInfo("study.json")
    member.extract_version = 99  # of a program to come
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(member, "{}")
    for place in (tmp_path, tmp_path / "a.zip", tmp_path / "b.zip"):
        assert not lab_study.claims(place)


def test_a_study_without_a_run_is_refused(study, tmp_path):
    (tmp_path / "study.json").write_bytes((study.root / "study.json").read_bytes())
    with pytest.raises(UserError, match="has trained nothing yet"):
        lab_study.read(tmp_path, Asked())
