"""Where a study is, and why it decided so: what is told of odd ones."""

import re
from pathlib import Path

import pytest
from support.called import answered
from support.invented import invent

from ebc_lab.config.errors import UserError
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.stages.rules import Undecidable

EVIDENCE = Path(__file__).parents[3] / "docs/evidence"


@pytest.mark.thorough
@pytest.mark.parametrize(("outcome", "goes_on"), [("failed", False), ("lost", True)])
def test_a_finished_study_goes_on_only_where_its_command_trains_what_failed(
    tmp_path, text_file, outcome, goes_on
):
    def fate(spec):
        return {"outcome": outcome, "cause": "x"} if spec.kind != "train" else {}

    study = invent(tmp_path, ["data=path", f"data.file={text_file}"], fate=fate, drawn=False)
    found = status(study)
    assert found["state"] == "finished_with_failures"
    assert bool(found["continue"]) == goes_on


def test_a_study_whose_runs_failed_is_not_called_interrupted(tmp_path, text_file):
    def fate(spec):
        return {"outcome": "failed", "cause": "RuntimeError: no kernel"}

    own = ["data=path", f"data.file={text_file}", "study.name=x"]
    with pytest.raises(Undecidable):
        invent(tmp_path, own, fate=fate, drawn=False)
    first = answered("status", str(tmp_path / "x"), cwd=tmp_path).stdout.splitlines()[0]
    assert re.match(r"x stopped, \d+ runs failed \(RuntimeError: no kernel\) ", first)


def test_candidates_that_could_not_be_chosen_are_not_called_absent(tmp_path):
    shown = answered("why", str(EVIDENCE / "published.zip"), "calibrate", cwd=tmp_path).stdout
    assert "changed it — Adam: none of the other 5 candidates was eligible" in shown


def test_a_stage_that_the_study_does_not_have_is_told_those_that_it_has(tmp_path, text_file):
    study = invent(tmp_path, ["data=path", f"data.file={text_file}"], stages=1, drawn=False)
    said = r"has no stage finalz \(did you mean finals\?\): it has lr_sweep, calibrate, lr_scale, finals"
    with pytest.raises(UserError, match=said):
        why(study, "finalz")
