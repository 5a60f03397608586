"""Where a study is, by what software, and why it decided so: what is told of odd ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.called import answered
from support.invented import invent

from ebc_lab.config.errors import UserError
from ebc_lab.report.page import evidence
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.store import attempts, bundle

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


# -- which software trained a run ----------------------------------------------------------------------------


def code_in(study, code_of):
    """Write the code that `code_of` gives for each run, by its number, into the `begin` events."""
    for number, run in enumerate(study.run_ids()):
        log = attempts.log(study.run_dir(run))
        for event in log:
            event.pop("code", None)
            if event["event"] == "begin" and (code := code_of(number)):
                event["code"] = code
        study.run_files(run).attempts.write_text("".join(f"{json.dumps(event)}\n" for event in log))


def test_an_upgrade_in_the_middle_of_a_study_is_said_wherever_it_is_shown(own_copy, tmp_path):
    study = own_copy[1]
    here = attempts.code_here()
    recorded = status(study)
    assert recorded["trained_by"] == {attempts.software(here): 25}
    assert recorded["upgraded"] == ""
    bundle.export(study, tmp_path / "brief.zip", brief=True)
    assert status(bundle.Bundled(tmp_path / "brief.zip"))["trained_by"] == recorded["trained_by"]
    code_in(study, lambda number: {**here, "ebc_lab": "0.9", "torch": "2.11.0"} if number < 10 else here)
    found = status(study)
    assert sum(found["trained_by"].values()) == 25
    sentence = rf"trained by ebc-lab .* \(\d+ runs\) and .*: `ebc-lab rerun {study.root} --run \S+` trains"
    assert re.match(sentence, found["upgraded"])
    assert "ebc-lab 0.9 with torch 2.11.0 under Python" in found["upgraded"]
    assert f"warning: {found['upgraded']}" in answered("status", str(study.root), cwd=tmp_path).stdout
    page = evidence.gather(study, lenient=True)
    assert page["upgraded"].startswith("trained by")
    assert re.fullmatch(r"ebc-lab .*\(\d+ runs\) and ebc-lab .*\(\d+ runs\)", page["trained_by"])


@pytest.mark.thorough
def test_a_call_by_other_software_than_the_runs_were_trained_by_says_so_first(own_copy, undrawn):
    config, study = own_copy
    code_in(study, lambda number: {**attempts.code_here(), "ebc_lab": "0.9"})
    said = []
    shutil.rmtree(study.run_dir(study.run_ids()[-1]))
    autopilot(config, Listener(say=said.append))
    [warning] = [line for line in said if line.startswith("warning: ")]
    here = attempts.software(attempts.code_here())
    assert re.match(
        rf"warning: trained by ebc-lab 0\.9 .* \(\d+ runs\) and {re.escape(here)} \(this call\): ", warning
    )


def test_logs_of_earlier_versions_are_read_and_an_attempt_that_began_anew_counts_alone(own_copy):
    study = own_copy[1]
    code_in(study, lambda number: None)
    assert list(status(study)["trained_by"]) == [attempts.UNRECORDED]
    assert status(study)["upgraded"] == ""
    code_in(study, lambda number: {"ebc_lab": 3} if number else attempts.code_here())  # one is damaged
    assert set(status(study)["trained_by"]) == {attempts.UNRECORDED, attempts.software(attempts.code_here())}
    folder = study.run_dir(study.run_ids()[0])
    for event in ("begin", "restarted", "begin"):
        attempts.note(folder, event, host="h", pid=1)
    assert attempts.history(folder).software == (attempts.UNRECORDED,)
