"""q, the KL of the proposal to second order, and what the loss should do and does along it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..logits import centre, half_fisher, rms_norm, token_mean
from ..proposal import Proposal
from ..scalars import Number
from ..sensitivity import linearised
from ..step import Forecast, StepStats


def predict(stats: StepStats, proposal: Proposal, judging: bool, instead: str) -> None:
    """Record q of the budgeted proposal from one derivative; if `judging`, the forecast for the loss too.
    Raises as `linearised`."""
    batch = proposal.batch
    updates = proposal.by_name(proposal.updates())
    direction = {name: updates[name] for name in (f"model.{proposal.names[i]}" for i in proposal.scaled)}
    z, dz = linearised(batch.functional, proposal.by_name(proposal.old), direction, instead)
    q = half_fisher(z, dz, batch.probe.mask).double()
    stats.predicted_kl = proposal.number(proposal.workers.mean(q, batch.probe.count()))
    if judging:
        loss = batch.probe_loss(z)
        targets = batch.probe.targets
        assert targets is not None
        rise = (z.softmax(-1) * dz).sum(-1) - dz.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        rise = torch.where(targets >= 0, rise, 0)  # negative: positions that the loss ignores
        stats.forecast = Forecast(loss.double(), token_mean(rise, batch.probe.mask).double())


def judge(stats: StepStats, proposal: Proposal) -> dict[str, Number]:
    """Return by how much the loss on the probe rows fell, and what slope and q of the proposal predicted."""
    assert stats.predicted_kl is not None
    assert stats.forecast is not None
    weights = list(proposal.old)  # what is not budgeted stays where it was
    for i in proposal.scaled:
        weights[i] = proposal.weights[i]
    after = proposal.batch.probe_loss(proposal.batch.functional(proposal.by_name(weights)))
    return {
        "loss_drop": stats.forecast.loss - after.double(),
        "slope": stats.forecast.slope,
        "q": stats.predicted_kl,
        "c": stats.clip_coefficient,
    }


def budgeted_movement(stats: StepStats, proposal: Proposal) -> Number:
    """Return T of what the budget covers: under `matrices`, the rest is put back to W for one forward."""
    assert stats.movement is not None
    rest = [i for i in range(len(proposal.weights)) if i not in proposal.scaled]
    if not rest:
        return stats.movement
    rows = proposal.audit_rows
    free: list[Tensor] = [proposal.layout.weights[i] for i in rest]
    applied = [w.clone() for w in free]
    torch._foreach_copy_(free, [proposal.old[i] for i in rest])
    movement = rms_norm(centre(proposal.batch.logits(rows.inputs)) - centre(rows.z), rows.mask)
    torch._foreach_copy_(free, applied)
    return proposal.number(proposal.workers.rms(movement, rows.count()))
