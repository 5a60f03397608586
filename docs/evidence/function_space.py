"""A learning rate for every tensor, in units of what its step does to the logits: after FLeRM (Milsom et al.,
arXiv:2502.17405), which docs/evidence/function_space.yaml compares: a user's own stabilizer."""

import json
from pathlib import Path

import torch
from function_space_base import BASE

from ebc_lab.components.stabilizers.rivals import Rival, share
from ebc_lab.ebc.sensitivity import linearised


class FunctionSpaceRate(Rival):
    """Every tensor's update times base/d: d is how far the tensor alone would move the logits at a rate of 1,
    to first order (rms over tokens and vocabulary), and base what d was at the same share of a recorded run.

    Measured by forward mode, exactly, on the probe's rows at every `every`-th step, and averaged as the paper
    does (decay 0.9). Between measurements the factors stay. As there, they raise a rate as well as lower it.

    Args:
        every: steps between measurements.
        base: which of the recorded runs in `function_space_base.py`; without one nothing is changed.
        record: a file to which what is measured is written.
    """

    default = 1.0
    keeps_old = True
    decay = 0.9

    def __init__(self, model, optimizers, *, every, base=None, record=None, **options):
        super().__init__(model, optimizers, **options)
        self.every, self.record = every, record
        self.base = BASE[base] if base else None
        self.squares = torch.zeros(len(self.weights), dtype=torch.float64)
        self.factors = torch.ones(len(self.weights), dtype=torch.float64)
        self.seen = []

    def _own_state(self):
        return {"squares": self.squares.clone(), "factors": self.factors.clone(), "seen": list(self.seen)}

    def _load_own_state(self, state):
        self.squares, self.factors, self.seen = state["squares"], state["factors"], list(state["seen"])

    def _measures(self, t):
        return t % self.every == 0

    def _limit_update(self, stats, proposal):
        updates = proposal.updates()
        if self._measures(proposal.t):
            self._measure(proposal, updates)
        if self.base:
            for i, factor in enumerate(self.factors.tolist()):
                self.weights[i].copy_(proposal.old[i] + updates[i] * factor)
        lengths = torch.stack([torch.linalg.vector_norm(u) for u in updates]).double()
        taken = torch.linalg.vector_norm(lengths * self.factors)
        stats.clip_coefficient = share(taken, torch.linalg.vector_norm(lengths))

    def _measure(self, proposal, updates):
        call = proposal.t // self.every
        weights = proposal.by_name(proposal.old)
        for i, (name, rate, update) in enumerate(zip(proposal.names, self._rates(), updates, strict=True)):
            direction = {f"model.{name}": update / rate}
            moved = linearised(proposal.batch.functional, weights, direction, "another model")[1]
            self.squares[i] = self.decay * self.squares[i] + (1 - self.decay) * moved.double().square().mean()
        moves = (self.squares / (1 - self.decay ** (call + 1))).sqrt()
        if self.base:
            wanted = self.base[min(call, len(self.base) - 1)]
            self.factors = torch.tensor([wanted[n] for n in proposal.names], dtype=torch.float64) / moves
        self.seen.append(dict(zip(proposal.names, moves.tolist(), strict=True)))
        if self.record:
            Path(self.record).write_text(json.dumps(self.seen))
