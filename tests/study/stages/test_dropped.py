"""An optimizer that loses the grid of lr_sweep does not vanish: by how much is said, and what that tells."""

import pytest
from support.played import config_of, decided, done

from ebc_lab.study.stages.stage import stage_of


def swept(behind, control=0.0):
    """Muon `behind` nats on the short grid; long runs are 0.5 nats better; replicates spread by 0.01."""
    config = config_of("lr_sweep.optimizers=[adam,muon]")

    def answer(spec):
        if spec.role == "grid":
            best = 4e-3 if spec.run.optimizer.name == "adam" else 1.6e-2
            off = abs(spec.run.optimizer.lr / best - 1)
            return done(2.5 + off + behind * (spec.run.optimizer.name == "muon"))
        return done(2.0 + 0.01 * (spec.run.seed % 100) + control * (spec.role == "control"))

    return decided("lr_sweep", config, {}, answer)


@pytest.mark.parametrize(("behind", "told_apart"), [(0.02, False), (0.3, True)])
def test_who_is_dropped_is_said_with_a_margin(behind, told_apart):
    decision = swept(behind)
    [pair] = decision["tracks"]["adam_none"]["dropped"]
    assert pair["behind"] == pytest.approx(behind)
    assert pair["behind_sigma"] == pytest.approx(behind / decision["tracks"]["adam_none"]["sigma"])
    assert pair["told_apart"] == told_apart
    [headline] = stage_of("lr_sweep").headlines(decision)
    assert f"dropped: muon_none, {behind:.4f} nats" in headline
    assert ("not told apart" in headline) != told_apart
    assert any("lr_sweep.keep=all" in note for note in decision["notes"]) != told_apart
    # on the grid alone: not its loss of the short grid minus the baseline's of the long run
    [could] = stage_of("lr_sweep").would_change(decision)
    assert f"muon_none would have had to be {behind:.4f} nats better on the grid" in could


def test_a_fair_control_that_is_worse_than_the_baseline_is_warned_of():
    decision = swept(0.3, control=0.1)
    assert any("0.1000 nats worse than the constant baseline" in note for note in decision["notes"])
    assert "worse than the baseline" in stage_of("lr_sweep").headlines(decision)[0]
