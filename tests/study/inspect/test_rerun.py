"""One run trained again from its recording: the same bits, or where they part."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.called import answered, called, refused

from ebc_lab.config import identity as naming
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.records.json_files import read_json, write_checksummed, write_json
from ebc_lab.records.spec import RunSpec
from ebc_lab.study.inspect import rerun
from ebc_lab.study.store import attempts
from ebc_lab.study.store.bundle import Bundled, export

EVIDENCE = Path(__file__).parents[3] / "docs/evidence"
BASELINE = "adam_none_baseline_x1"


def states(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def chosen(study, **wanted):
    return rerun.chosen(study, **{"arm": None, "seed": None, "stage": None, "run": None, **wanted})


def test_a_run_trained_again_has_the_bits_of_its_recording_which_stays_as_it_is(finished, tmp_path):
    study = finished[1].study
    before = states(study.root)
    wanted = ("--arm", BASELINE, "--seed", "0")
    said = answered("rerun", str(study.root), *wanted, cwd=tmp_path).stdout.splitlines()
    run = chosen(study, arm=BASELINE, seed=0)["run_id"]
    assert said[0] == f"{run}, again in outputs/rerun/done/{run}"
    assert re.fullmatch(
        r"the same bits as recorded: 25 steps, byte by byte, 3 evaluations and \d+ figures of result\.json",
        said[-1],
    )
    again = tmp_path / "outputs/rerun/done" / run
    assert (again / "steps.csv").read_bytes() == study.run_files(run).steps.read_bytes()
    assert states(study.root) == before
    found = json.loads(
        answered(  # it is there: only compared
            *("rerun", str(study.root), "--run", run[-10:], "--output", str(again), "--json"), cwd=tmp_path
        ).stdout
    )
    assert (found["same"], found["renamed"], found["losses"]["val_loss"][0]) == (
        True,
        [],
        study.result(run)["val_loss"],
    )


@pytest.fixture
def parted(own_copy, finished):
    """A recording of another loss from step 7 on, by another torch on another CPU; and the run that was
    trained again, which is the original."""
    study, original = own_copy[1], finished[1].study
    run = chosen(study, arm=BASELINE, seed=0)["run_id"]
    files = study.run_files(run)
    rows = files.steps.read_text().splitlines()
    rows[8:] = [re.sub(r"^(\d+),\d\.\d+", r"\1,9.5", row) for row in rows[8:]]
    files.steps.write_text("\n".join(rows) + "\n")
    result = study.result(run)
    result["val_loss"] += 0.5
    result["streams"]["steps.csv"] = "0" * 64
    write_checksummed(files.result, result)
    header = study.header()
    header["hardware"]["cpu"] = "abacus"
    write_checksummed(study.header_file, header)
    log = [{**event, "host": header["hardware"]["host"]} for event in attempts.log(files.directory)]
    log[0]["code"] = {**attempts.code_here(), "torch": "1.0"}
    files.attempts.write_text("".join(f"{json.dumps(event)}\n" for event in log))
    return study, run, original.run_dir(run)


def test_where_a_run_parts_from_its_recording_and_why_is_said(parted, tmp_path):
    study, run, again = parted
    folder = shutil.copytree(again, tmp_path / "again")
    spec = read_json(folder / "spec.json")
    write_json(folder / "spec.json", {**spec, "run_id": run[-10:]})  # as outside of a study
    done = called("rerun", str(study.root), "--run", run, "--output", str(folder), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    text = done.stdout
    assert re.search(r"^not the same as recorded: compared were 25 steps by their numbers", text, re.M)
    assert re.search(
        r"^steps\.csv: first at step 7, loss: 9\.5 recorded, [\d.]+ now \(-[\d.]+\)$", text, re.M
    )
    assert re.search(r"^val_loss: [\d.]+ recorded, [\d.]+ now \(-0\.5\)$", text, re.M)
    [why] = re.findall(r"^may be why: (.*)", text, re.M)
    assert why.startswith(f"torch 1.0 there, {attempts.code_here()['torch']} here")
    assert "cpu abacus there" in why


def test_a_brief_recording_is_compared_by_the_checksum_of_its_steps_and_its_figures(
    parted, finished, tmp_path
):
    study, run, again = parted
    bundle = tmp_path / "brief.zip"
    export(finished[1].study, bundle, brief=True)
    original = Bundled(bundle)
    found = rerun.compare(original, original.spec(run), again)
    assert found["same"]
    assert rerun.in_words(found)[0].startswith(
        "the same bits as recorded: 25 steps by the sha256 of steps.csv"
    )
    study.run_files(run).steps.unlink()
    said = rerun.in_words(rerun.compare(study, study.spec(run), again))
    assert "steps.csv: other bytes; the recording has their sha256 alone" in said
    result = study.result(run)
    del result["streams"]
    write_checksummed(study.run_files(run).result, result)
    said = rerun.in_words(rerun.compare(study, study.spec(run), again))
    assert "the recording has neither steps.csv nor its sha256: no step compared" in said


def test_a_run_that_has_another_name_in_this_version_is_told_why(finished, monkeypatch):
    study = finished[1].study
    spec = chosen(study, arm=BASELINE, seed=1)
    assert rerun.renamed_in_words(spec) == []
    monkeypatch.setattr(naming, "NUMERICS_VERSION", 99)
    [line] = rerun.renamed_in_words(spec)
    assert re.fullmatch(r"this ebc-lab .* but \S+_s1-\w+: numerics_version was \d+ and is 99", line)


REFUSED = [
    (["--arm", "x"], f"stage finals of study done has no arm x: it has {BASELINE}, "),
    (["--arm", "{swept}"], "; --stage lr_sweep has it"),
    (["--arm", BASELINE, "--seed", "7"], "has no seed 7: it has 0 or 1"),
    (["--arm", BASELINE], "2 runs of stage finals of study done fit: tell them apart by --seed, 0 or 1"),
    ([], f"tell them apart by --arm, {BASELINE}, "),
    (["--stage", "final"], "has no stage final (did you mean finals?)"),
    (["--run", "0000000000"], "study done has no training run 0000000000"),
    (["--run", "0000000000", "--seed", "7"], "--run names one run by itself"),
    (["--arm", BASELINE, "--seed", "0", "-o", "{root}/x"], "is in a study, which is only read"),
    (["--arm", BASELINE, "--seed", "0", "-o", "mine"], "mine holds something else than this run"),
    (["data=pydoc", "--arm", BASELINE, "--seed", "0"], "data would make it another run"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_what_cannot_be_done_again_is_refused_in_a_sentence(finished, tmp_path, words, sentence):
    study = finished[1].study
    root, swept = study.root, next(r.brief.arm for r in study.records() if r.brief.stage == "lr_sweep")
    words = [word.format(root=root, swept=swept) for word in words]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "steps.csv").touch()
    assert sentence in refused("rerun", str(root), *words, cwd=tmp_path)


@pytest.mark.thorough
def test_a_run_without_its_text_or_the_run_that_it_starts_from_names_what_is_missing(own_copy):
    study = own_copy[1]
    source, spec = (chosen(study, arm=BASELINE, seed=seed) for seed in (0, 1))
    _, run = study.read_spec(spec["run_id"])
    init = InitConfig("run", source["run_id"], "0" * 64, "none")
    asked = RunSpec("finals", "none", "started", 1.0, init.put_into(replace(run)))
    study.write_spec(asked)
    started = study.spec(asked.run_id)
    again = f"`ebc-lab rerun {study.root} --run {source['run_id']}` trains that run again"
    with pytest.raises(UserError, match=re.escape(again)):
        rerun.settings_of(study, started)
    weights = study.run_files(source["run_id"]).weights
    weights.write_bytes(b"")
    assert rerun.settings_of(study, started).init.run == str(weights.parent)
    with pytest.raises(UserError, match="seed would make it another run"):
        rerun.settings_of(study, spec, ["seed=3"])
    text = Path(run.data.file)
    assert rerun.settings_of(study, spec, [f"data.file={text.parent}/./{text.name}"]).seed == 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("bundle", "run", "sentence"),
    [
        ("controls", "4e45e66213", r"needs the steps\.csv of adam_\S+, which the recording does not hold"),
        ("finetune", "3244102851", r"needs the weights\.pt of adam_\S+, which the recording does not hold"),
        ("cautious", "", ""),
    ],
)
def test_runs_of_recorded_studies_can_be_trained_again(bundle, run, sentence):
    study = Bundled(EVIDENCE / f"{bundle}.zip")
    if not run:
        spec = chosen(study, arm="cautious", seed=0)
        assert rerun.settings_of(study, spec).optimizer.target.endswith(":Cautious")
        assert [key for key, _, _ in rerun.renamed(spec)[1]] == ["numerics_version"]
        return
    with pytest.raises(UserError, match=sentence):
        rerun.settings_of(study, chosen(study, run=run))
