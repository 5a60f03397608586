"""A part of one's own that cannot work is met before anything is trained, by its arm and its line."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.sources import PLACES
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.launch import rehearse as module
from ebc_lab.study.launch.rehearse import rehearse
from ebc_lab.study.store.study import study_of

PARTS = """import torch


def ramp(step, steps, floor=0.1):
    return max(floor, 1 - step / steps)


def late(step, steps):
    return 1 / abs(7 - step)


class Idle(torch.optim.SGD):
    def step(self, closure=None):
        return None


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("mean")
"""
SUITE = """
study: {stages: [lr_sweep, ablation]}
lr_sweep: {optimizers: [adam]}
ablation:
  question: is it better?
  reference: adam
  arms:
    adam: {about: Adam}
    ramp: {about: mine, settings: {lr_schedule: {name: custom, target: './rehearsed.py:ramp'}}}
"""


@pytest.fixture
def asked(tiny, tmp_path, monkeypatch):
    """Settings of arms `hot`, … -> the configuration of a suite that has them."""
    monkeypatch.setenv(PLACES, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rehearsed.py").write_text(PARTS)
    (tmp_path / "suite.yaml").write_text(SUITE)
    usual = [o for o in tiny if not o.startswith(("calibrate", "finals"))]

    def config(*settings):
        names = ("hot", "late", "broken")
        arms = [
            f"+ablation.arms.{a}={{about: {a}, settings: {{{s}}}}}"
            for a, s in zip(names, settings, strict=False)
        ]
        return compose([*usual, "study=./suite.yaml", "launcher=inline", "output_dir=out", *arms])

    return config


def test_parts_that_cannot_work_are_refused_before_the_first_run(asked, tmp_path, monkeypatch):
    """The first by the name of its arm; the others, which the same process tried, by the same words."""
    bad = {
        "lr_schedule: {name: custom, target: ./rehearsed.py:ramp, arguments: {flor: 0.2}}": (
            r"rehearsed\.py:4\).*unexpected keyword argument 'flor'"
        ),
        "lr_schedule: {name: custom, target: ./rehearsed.py:late}": r"^rehearsed\.py:9: ZeroDiv",
        "optimizer: {name: custom, target: ./rehearsed.py:Broken}": r"^rehearsed\.py:19: KeyError",
    }
    first, *_ = bad.values()
    answers, run = [], subprocess.run

    def heard(*command, **how):
        done = run(*command, **how)
        answers.extend(map(json.loads, done.stdout.splitlines()))
        return done

    monkeypatch.setattr(module.subprocess, "run", heard)
    with pytest.raises(UserError, match=f"arm hot: .*{first}.*: mend it"):
        autopilot(asked(*bad), Listener())
    assert answers.pop(0) == {}  # arm `ramp` can be trained
    for words, answer in zip(bad.values(), answers, strict=True):
        assert re.search(words, answer["refused"])
    assert not (tmp_path / "out").exists()
    assert "rehearsed" not in sys.modules  # the driver imports none of it


@pytest.mark.thorough
def test_parts_are_tried_once_and_again_when_they_are_edited(asked, tmp_path, monkeypatch):
    config = asked("optimizer: {name: custom, target: ./rehearsed.py:Idle}")
    said = []
    rehearse(config, study_of(config), said.append)
    assert said == ["warning: arm hot: rehearsed.py:12: its first step moved no parameter"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_tried", lambda *_: pytest.fail("tried again"))
        rehearse(config, study_of(config), said.append)
        plain = replace(config, ablation=replace(config.ablation, arms={}))
        rehearse(plain, study_of(config), said.append)  # nothing of one's own: no process, no time
    (tmp_path / "rehearsed.py").write_text(PARTS.replace("return None", "raise KeyError('a typo')"))
    with pytest.raises(UserError, match=r"arm hot: rehearsed\.py:14: KeyError: 'a typo'"):
        rehearse(asked("optimizer: {name: custom, target: ./rehearsed.py:Idle}"), study_of(config), print)
