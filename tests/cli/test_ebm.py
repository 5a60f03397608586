"""`ebc-lab ebm …` as a user types it: a tiny model, trained once, diagnosed, evaluated, asked and served."""

import functools
import json
import math
import re
import shutil
import signal
import subprocess
import urllib.request
from dataclasses import replace

import pytest
import torch
from support import called
from support.called import CLI, answered
from support.called import called as call

from ebc_lab.ebm.apps.serve import listening
from ebc_lab.records.json_files import read_json
from ebc_lab.records.spec import RunSpec
from ebc_lab.records.streams import read_columns
from ebc_lab.study.store import manifest
from ebc_lab.study.store.study import Study
from ebc_lab.workloads.kept import read_model

OWN = [
    *("scale=smoke", "data=path", "stabilizer=none", "device=cpu", "dtype=float32", "threads_per_run=1"),
    *("compile=off", "steps=12", "eval_every=3", "eval_windows=8", "model.context=16", "batch_size=8"),
    *("ebm.n=8", "ebm.splats=40", "ebm.neighbours=4", "ebm.hidden=8", "ebm.soc_every=2", "ebm.keep_every=6"),
    *("audit_every=4", "audit_tokens=32"),
]


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory):
    """The folder of a run; tests must not change it."""
    folder = tmp_path_factory.mktemp("ebm")
    answered("ebm", "train", *OWN, f"data.file={text_file}", "hydra.run.dir=run", cwd=folder)
    return folder / "run"


@pytest.fixture
def own(run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(run, tmp_path / "own")


@pytest.fixture
def edit(own):
    """Change the kept model: its content, and its run's settings, by a function of both; or whole fields."""

    def call(change=lambda content, settings: None, **fields):
        content = torch.load(own / "model.pt", weights_only=True)
        settings = json.loads(content["run"])
        change(content, settings)
        torch.save({**content, "run": json.dumps(settings), **fields}, own / "model.pt")

    return call


def ask(*arguments, cwd):
    return json.loads(answered("ebm", *arguments, "--json", cwd=cwd).stdout)


refused = functools.partial(called.refused, "ebm")


# -- train ---------------------------------------------------------------------------------------------------


def test_train_refuses_another_workload_and_what_train_refuses(tmp_path):
    assert "is of workload=ebm" in refused("train", "workload=gpt", cwd=tmp_path)
    assert "is unknown" in refused("train", "workload=ebm", "index=hsnw", "scale=smoke", cwd=tmp_path)


# -- generate ------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_generate_prints_the_prompt_and_what_follows_the_same_for_the_same_seed(run, tmp_path):
    given = ("generate", str(run), "--prompt", "the cat", "--tokens", "20")
    first = answered("ebm", *given, cwd=tmp_path)
    assert first.stdout.startswith("the cat")
    assert len(first.stdout) == len("the cat") + 20 + 1
    assert call("ebm", *given, cwd=tmp_path).stdout == first.stdout
    found = ask(*given, cwd=tmp_path)
    assert found["prompt"] + found["text"] + "\n" == first.stdout
    assert (found["tokens"], found["temperature"], found["langevin_steps"], found["seed"]) == (20, 0.8, 20, 0)
    assert ask(*given, "--seed", "1", cwd=tmp_path)["text"] != found["text"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "the Ö"], "the vocabulary has no 'Ö'"),
        (["--prompt", ""], "one token at least"),
        (["--prompt", "a", "--temperature", "-0.5"], "temperature must lie between 0 and"),
        (["--prompt", "a", "--langevin-step", "2"], "a chain of step 2.0 is unstable"),
        (["--prompt", "a", "--tokens", "-1"], "tokens must lie between 0 and"),
        (["--split", "tset"], "did you mean test?"),
        (["--samples", "0"], "greater than or equal to 1"),
    ],
)
def test_generate_and_evaluate_refuse_in_one_sentence(run, tmp_path, options, words):
    command = "generate" if "--prompt" in options else "evaluate"
    assert words in refused(command, str(run), *options, cwd=tmp_path)


def test_a_chain_that_leaves_the_finite_numbers_names_its_step(own, edit, tmp_path):
    edit(lambda content, settings: content["weights"]["pair_weight"].fill_(math.inf))
    given = ("--prompt", "the", "--tokens", "3")
    assert re.search(r"step \d", refused("generate", str(own), *given, cwd=tmp_path))


# -- evaluate ------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_evaluate_agrees_with_the_run_s_own_result(run, tmp_path):
    found = ask("evaluate", str(run), "--samples", "2", cwd=tmp_path)
    result = read_json(run / "result.json")
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    assert found["loss_se"] == pytest.approx(result["test_se"], rel=1e-6)
    assert found["bits_per_character"] == pytest.approx(result["test_bits_per_char"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    val = ask("evaluate", str(run), "--split", "val", cwd=tmp_path)
    assert val["loss"] == pytest.approx(result["val_loss"], rel=1e-6)
    own = result["workload"]
    for name in ("energy", "state_spread", "winners", "state_coverage", "splat_coverage"):
        assert val[name] == pytest.approx(own[name], rel=1e-5), name
    assert val["baselines"] == {name: pytest.approx(own[name]) for name in ("unigram", "bigram")}
    assert val["sampled_loss"]["settled"] == pytest.approx(own["settled"], rel=1e-5)
    assert [level["sigma"] for level in val["levels"]] == [0.01, 0.05, 0.1, 0.2, 0.5]
    assert val["levels"][-1]["matched"] == pytest.approx(own["matched_0p5"], rel=1e-5)


def test_evaluate_prints_every_figure(run, tmp_path):
    done = answered("ebm", "evaluate", str(run), "--samples", "3", cwd=tmp_path)
    for words in (
        *("loss", "perplexity", "bits/character", "an upper bound, 3 samples", "unigram", "bigram"),
        *("energy", "coverage", "R²", "s.e.", "matched", "0.05"),
    ):
        assert words in done.stdout


def test_evaluate_says_that_the_text_has_changed(own, edit, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:-1] + "!")
    edit(lambda content, settings: settings["data"].update(file=str(other)))
    assert "has changed" in refused("evaluate", str(own), cwd=tmp_path)


# -- diagnose ------------------------------------------------------------------------------------------------


def test_diagnose_judges_the_latest_evaluation(run, tmp_path):
    found = ask("diagnose", str(run), cwd=tmp_path)
    judged = {finding["cause"]: finding for finding in found["findings"]}
    evals = read_columns(run / "evals.csv")
    limits = {"splat_coverage", "kappa_at_limit", "dropped_mass", "load_max", "soc_rate"}
    levels = {f"r2_{sigma}" for sigma in ("0p01", "0p05", "0p1", "0p2", "0p5")}
    assert set(judged) == {"energy"} | limits | levels
    for name in limits | levels:
        assert judged[name]["figure"] == pytest.approx(evals[name][-1], rel=1e-6), name
    for level in levels:
        error = evals[level.replace("r2", "r2_se")][-1]
        assert judged[level]["threshold"] == pytest.approx(-2 * error, rel=1e-6)
    rates = [rate for rate in evals["soc_rate"] if rate > 0]
    assert judged["soc_rate"]["threshold"] == (pytest.approx(rates[0]) if rates else None)
    for finding in judged.values():
        assert (finding["verdict"] == "alert") == bool(finding["recommendation"])
    assert found["trends"]["val_loss"] in ("decreasing", "increasing", "stable", "fluctuating")
    assert found["criticality"].startswith("not tested")


def test_diagnose_prints_figure_threshold_verdict_and_recommendation(own, edit, tmp_path):
    edit(lambda content, settings: content["curve"][-1].update(splat_coverage=0.25, kappa_at_limit=0.75))
    shown = answered("ebm", "diagnose", str(own), cwd=tmp_path).stdout
    assert re.search(r"^splat_coverage +0\.25 +0\.8 +alert +.*ebm\.revive", shown, re.MULTILINE)
    assert re.search(r"^kappa_at_limit +0\.75 +0\.5 +alert", shown, re.MULTILINE)
    assert "energy trend: " in shown
    assert "avalanches: not tested" in shown


def test_a_model_alone_is_diagnosed_like_its_run(run, tmp_path):
    shutil.copy(run / "model.pt", tmp_path / "alone.pt")
    alone, whole = ask("diagnose", "alone.pt", cwd=tmp_path), ask("diagnose", str(run), cwd=tmp_path)
    assert alone | {"model": whole["model"]} == whole


def test_avalanches_of_a_power_law_are_called_critical(own, edit, tmp_path):
    def topple(content, settings):
        place = next(name for name in content["weights"] if name.endswith("pile._extra_state"))
        shares = torch.rand(400, generator=torch.Generator().manual_seed(0))
        content["weights"][place] = {"sizes": (shares**-1.25).long().clamp(1, 100_000)}

    edit(topple)
    found = ask("diagnose", str(own), cwd=tmp_path)
    assert found["law"]["critical"]
    assert "critical: a power law" in call("ebm", "diagnose", str(own), cwd=tmp_path).stdout


def test_a_report_is_written_beside_the_model(own, tmp_path):
    found = ask("diagnose", str(own), "--report", cwd=tmp_path)
    kept = read_json(own / "model.diagnosis.json")
    assert kept | {"model": found["model"]} == found
    page = (own / "model.diagnosis.md").read_text()
    for finding in found["findings"]:
        assert f"| {finding['cause']} | " in page
    done = call("ebm", "diagnose", str(own / "models/step_6.pt"), "--report", cwd=tmp_path)
    assert "step_6.diagnosis.md" in done.stderr
    assert (own / "models/step_6.diagnosis.json").exists()


def test_a_report_in_a_study_is_no_file_of_its_evidence(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "runs/one")
    before = list(manifest.files(tmp_path))
    assert "runs/one/model.pt" in before
    ask("diagnose", str(folder), "--report", cwd=tmp_path)
    assert (folder / "model.diagnosis.md").exists()
    assert list(manifest.files(tmp_path)) == before


@pytest.mark.parametrize("curve", [[], [{"val_loss": 1.0}]])
def test_a_curve_that_says_little_is_no_mistake_and_one_of_other_values_is_refused(
    own, edit, tmp_path, curve
):
    edit(curve=curve)
    assert ask("diagnose", "own", cwd=tmp_path)["findings"] == []
    answered("ebm", "diagnose", "own", cwd=tmp_path)
    edit(curve=[5])
    assert "never writes" in refused("diagnose", "own", cwd=tmp_path)


def test_a_batch_has_one_row_per_kept_model_and_trends(own, tmp_path):
    found = ask("diagnose", "--batch", ".", cwd=tmp_path)
    assert [(row["model"], row["step"]) for row in found["models"]] == [
        ("own/model.pt", 12),
        ("own/models/step_6.pt", 6),
        ("own/models/step_12.pt", 12),
    ]
    assert found["trends"]["own"]["val_loss"] != "unknown"
    shown = call("ebm", "diagnose", "--batch", ".", cwd=tmp_path, COLUMNS="120")
    assert shown.stdout.count("step_") == 2
    assert "trends of each run" in shown.stdout


def test_a_batch_names_a_model_that_cannot_be_read_and_shows_the_others(own, tmp_path):
    (own / "models/step_6.pt").write_bytes(b"PK\x03\x04")
    done = call("ebm", "diagnose", "--batch", str(own), "--json", cwd=tmp_path)
    assert done.returncode == 4
    rows = {row["model"]: row for row in json.loads(done.stdout)["models"]}
    assert "is damaged" in rows[str(own / "models/step_6.pt")]["problem"]
    assert rows[str(own / "model.pt")]["step"] == 12
    shown = call("ebm", "diagnose", "--batch", str(own), cwd=tmp_path)
    assert shown.returncode == 4
    assert "damaged" in shown.stdout


def test_diagnose_needs_a_model_or_a_folder_with_models(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "takes a MODEL" in refused("diagnose", cwd=tmp_path)
    assert "takes a MODEL" in refused("diagnose", str(run), "--batch", str(run), cwd=tmp_path)
    assert "holds no model.pt" in refused("diagnose", "--batch", "empty", cwd=tmp_path)
    assert "is not a folder" in refused("diagnose", "--batch", "nowhere", cwd=tmp_path)


# -- which model ---------------------------------------------------------------------------------------------


@pytest.fixture
def study(run, tmp_path):
    """A study with three runs of two arms, one of which has no model."""
    found = Study(tmp_path / "study")
    found.prepare()
    found.header_file.write_text("{}")
    kept = read_model(run / "model.pt")
    runs = (("lr_sweep", "a", 100), ("finals", "a", 1), ("finals", "a", 0), ("finals", "b", 0))
    for stage, arm, seed in runs:
        spec = RunSpec(stage, "grid", arm, 1.0, replace(kept.run, seed=seed))
        found.write_spec(spec)
        if arm == "a":
            shutil.copy(run / "model.pt", found.run_files(spec.run_id).model)
    return found


def test_a_study_and_an_arm_name_the_last_stage_s_first_seed(study, tmp_path):
    found = ask("diagnose", "./study", "--arm", "a", cwd=tmp_path)
    folder = found["model"].split("/")[-2]
    assert study.read_spec(folder)[1].seed == 0
    asked = ("--arm", "a", "--output-dir", ".", "--prompt", "the", "--tokens", "3")
    assert ask("generate", "study", *asked, cwd=tmp_path)["text"]
    assert "name one of its arms with --arm, a." in refused("diagnose", "study", cwd=tmp_path)
    assert "with arm b has a model: it has a." in refused("diagnose", "./study", "--arm", "b", cwd=tmp_path)
    assert "there is no study" in refused("diagnose", "./nothing", "--arm", "a", cwd=tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["diagnose", "evaluate"])  # evaluate, generate and serve load alike
def test_what_is_no_model_of_ours_is_refused(own, tmp_path, command):
    (own / "model.pt").write_text("no model")
    assert "is damaged" in refused(command, "own", cwd=tmp_path)
    (own / "model.pt").unlink()
    assert "there is no model own/model.pt" in refused(command, "own", cwd=tmp_path)


def test_settings_of_the_sampler_in_a_model_are_checked_too(own, edit, tmp_path):
    edit(lambda content, settings: settings["sampler"].update(step=3.0))
    assert refused("generate", "own", "--prompt", "a", cwd=tmp_path)


# -- serve ---------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_serve_answers_until_it_is_told_to_end(run, tmp_path):
    pytest.importorskip("uvicorn")
    given = [*CLI, "ebm", "serve", str(run)]
    process = subprocess.Popen(
        given, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        body = json.dumps({"prompt": "the cat", "tokens": 20, "seed": 2}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{address}/generate", body)) as answer:
            text = json.load(answer)["text"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "no longer serving\n", "")
    given = ("--prompt", "the cat", "--tokens", "20", "--seed", "2")
    assert ask("generate", str(run), *given, cwd=tmp_path)["text"] == text


def test_serve_names_a_port_in_use(run, tmp_path):
    with listening() as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused("serve", str(run), "--port", str(port), cwd=tmp_path)
