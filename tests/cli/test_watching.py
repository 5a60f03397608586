"""Several studies watched at once: a line each, until all have ended."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest
from support.called import CLI, called, refused
from support.drivers import held_at_first, until, until_true

from ebc_lab.study.store.find import find_all
from ebc_lab.study.store.study import Study


@pytest.fixture
def studies(finished, tmp_path):
    """Folder `out` with two finished studies, and one whose last decision is gone."""
    out = tmp_path / "out"
    for name in ("shape_a", "shape_b", "other"):
        shutil.copytree(finished[1].study.root, out / name)
    decisions = out / "other" / "auto_decisions.json"
    decided = json.loads(decisions.read_text())
    decided.pop("finals")
    decisions.write_text(json.dumps(decided))
    return out


@pytest.mark.parametrize(
    ("asked", "names", "code"),
    [
        (["shape_a", "shape_b"], ["shape_a", "shape_b"], 0),
        (["shape_*"], ["shape_a", "shape_b"], 0),
        (["out"], ["other", "shape_a", "shape_b"], 3),
        (["./out/shape_b", "out/[os]*", "shape_b"], ["shape_b", "other", "shape_a"], 3),
    ],
)
def test_names_folders_and_patterns_are_each_study_once(studies, asked, names, code):
    watched = called("watch", *asked, "--output-dir", "out", cwd=studies.parent)
    assert watched.returncode == code, watched.stderr
    lines = watched.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == names
    state = {name: line.split(": ", 1)[1] for name, line in zip(names, lines, strict=True)}
    assert state["shape_b"].startswith("finished, ")
    assert "other" not in names or state["other"].startswith("interrupted, finals, ")


def test_a_folder_that_is_called_like_a_pattern_is_found_before_it_is_taken_for_one(studies):
    odd = studies.rename(studies.with_name("out [v2]"))
    (odd / "other").rename(odd / "shape_[c]")
    for asked, names in {
        "out [v2]": ["shape_[c]", "shape_a", "shape_b"],
        "out [v2]/shape_?": ["shape_a", "shape_b"],
        "out*/shape_[[]*": ["shape_[c]"],
    }.items():
        with contextlib.chdir(odd.parent):
            assert [study.name for study in find_all([asked], str(odd), print)] == names
    own, others = "shape_[c]", "shape_[ab]"
    assert [study.name for study in find_all([own, others], str(odd), print)] == [own, "shape_a", "shape_b"]
    assert called("watch", "out [v2]", cwd=odd.parent).returncode == 3


def test_what_is_no_study_or_no_several_is_a_sentence(studies):
    where = ("--output-dir", str(studies))
    assert "no study is called x*" in refused("watch", "x*", *where, cwd=studies)
    assert "there is no study at" in refused("watch", "none", *where, cwd=studies)
    assert "the page of one study" in refused("watch", "shape_*", "--open", *where, cwd=studies)


def test_a_damaged_study_is_said_and_stops_no_other(studies):
    (studies / "shape_a" / "study.json").write_text("{")
    watched = called("watch", "shape_*", "--output-dir", str(studies), cwd=studies)
    assert watched.returncode == 3
    first, second = watched.stdout.splitlines()
    assert first.startswith("shape_a: unreadable, ")
    assert second.startswith("shape_b: finished, ")


def let_go(study: Study) -> None:
    for folder in study.runs.iterdir():
        (folder / "go").touch()


@pytest.mark.thorough
def test_it_follows_a_running_study_to_its_end(studies, tiny, tmp_path):
    """The study waits in its first run until it is seen to be running."""
    own = ["launcher.slots=1", f"output_dir={tmp_path}", "study.name=new"]
    driver = [*CLI, "stage", "lr_sweep", *tiny, *own]
    held = {**os.environ, "PYTHONPATH": held_at_first(tmp_path)}
    study = Study(tmp_path / "new")
    with subprocess.Popen(driver, stdout=subprocess.DEVNULL, env=held) as running:
        while not list(study.runs.glob("*/progress.json")):
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(timeout=0.05)
        watch = [*CLI, "watch", str(study.root), "shape_a", "--output-dir", str(studies)]
        with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
            seen = until(watching, "new: running, lr_sweep, 0 runs done", "shape_a: finished, ")
            until_true(lambda: let_go(study) or running.poll() is not None)
            rest = watching.stdout.read()
    assert (running.returncode, watching.returncode) == (0, 3), seen + rest
    assert rest.splitlines()[-1].startswith("new: interrupted, ")
    assert "shape_a" not in rest, "it has not changed"
