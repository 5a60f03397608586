"""A part of one's own that cannot work is met before anything is trained, by its arm and its line."""

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
    """Settings of arm `hot` -> the configuration of a suite that has it."""
    monkeypatch.setenv(PLACES, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rehearsed.py").write_text(PARTS)
    (tmp_path / "suite.yaml").write_text(SUITE)
    usual = [o for o in tiny if not o.startswith(("calibrate", "finals"))]

    def config(hot):
        arm = f"+ablation.arms.hot={{about: hot, settings: {{{hot}}}}}"
        return compose([*usual, "study=./suite.yaml", "launcher=inline", "output_dir=out", arm])

    return config


@pytest.mark.parametrize(
    ("hot", "words"),
    [
        (
            "lr_schedule: {name: custom, target: ./rehearsed.py:ramp, arguments: {flor: 0.2}}",
            r"arm hot: .*rehearsed\.py:4\).*unexpected keyword argument 'flor'",
        ),
        ("lr_schedule: {name: custom, target: ./rehearsed.py:late}", r"arm hot: rehearsed\.py:9: ZeroDiv"),
        ("optimizer: {name: custom, target: ./rehearsed.py:Broken}", r"arm hot: rehearsed\.py:19: KeyError"),
    ],
)
def test_a_part_that_cannot_work_is_refused_before_the_first_run(asked, tmp_path, hot, words):
    with pytest.raises(UserError, match=words):
        autopilot(asked(hot), Listener())
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
