"""Every arm that a study can make, on an emulated CUDA device: graphs and resuming change no bit."""

import pytest
from support.emulated import arms

from ebc_lab.config.choices import groups


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in arms.QUICK else pytest.mark.slow) for n in arms.ARMS]
)
def test_an_arm_is_the_same_from_graphs_after_a_resume_and_beside_another(name, tmp_path, text_file):
    from support.emulated.trials import trial

    found = trial(arms.ARMS[name], tmp_path / "runs", text_file)
    assert found.outcome == "completed"
    assert bool(found.kinds) == (not found.eager)
    assert found.findings == {}
    assert found.graph_waits == {}
    assert found.graphed is not False
    assert found.resumed
    assert found.given_back


def test_every_choice_is_tried():
    assert set(arms.NEEDED) | arms.ELSEWHERE == set(groups())
    assert not set(arms.NEEDED) & arms.ELSEWHERE
    assert set(arms.QUICK) <= set(arms.ARMS)
