"""Hyperball around any optimizer, which docs/evidence/within.yaml compares: a user's own stabilizer."""

import torch

from ebc_lab.components.stabilizers.rivals import Rival, share


class Hyperball(Rival):
    """W ← n·unit(W + s·n·unit(ΔW)), n = ‖W‖, for each matrix of a block; the rest takes ΔW as it is
    (Wen et al., arXiv:2606.16899, there around Adam and Muon).

    s is `strength` times the learning rate over its peak.
    """

    default = 0.02
    keeps_old = True

    def __init__(self, model, optimizers, **options):
        super().__init__(model, optimizers, **options)
        self.peaks = self._rates()

    def _limit_update(self, stats, proposal):
        taken, proposed = [], []
        for i, (name, rate) in enumerate(zip(proposal.names, self._rates(), strict=True)):
            w, old = self.weights[i], proposal.old[i]
            update = w - old
            length = torch.linalg.vector_norm(update)
            proposed.append(length)
            if name.startswith("blocks.") and w.ndim == 2 and rate > 0 and length > 0:
                norm = torch.linalg.vector_norm(old)
                step = self.strength * rate / self.peaks[i] * norm
                w.copy_(old + update * (step / length))
                w.mul_(norm / torch.linalg.vector_norm(w))
            taken.append(torch.linalg.vector_norm(w - old))
        lengths = (torch.linalg.vector_norm(torch.stack(part)) for part in (taken, proposed))
        stats.clip_coefficient = share(*lengths)
