"""A two-layer perceptron, small enough to write every formula out, for the tests of the rivals."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ebc_lab.components.stabilizers.adagc import AdaGC
from ebc_lab.components.stabilizers.energy import EnergyBudget
from ebc_lab.components.stabilizers.rates import CDAT, AdaptiveWarmUp, GeN
from ebc_lab.components.stabilizers.rivals import (
    AdaptiveGradientClip,
    KLClip,
    NormClip,
    RMSClip,
    TrustRegion,
    ValueClip,
    ZClip,
)

CLASSES = {
    "norm_clip": NormClip,
    "value_clip": ValueClip,
    "agc": AdaptiveGradientClip,
    "zclip": ZClip,
    "adagc": AdaGC,
    "energy_raw": EnergyBudget,
    "energy_rms": EnergyBudget,
    "trust_region": TrustRegion,
    "kl_clip": KLClip,
    "rms_clip": RMSClip,
}
RATES = {"gen": GeN, "cdat": CDAT, "adaptive_warmup": AdaptiveWarmUp}  # they read the loss
UPDATE = ("trust_region", "kl_clip", "rms_clip")


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def backward(model, step=0, factor=1.0):
    """One backward pass on a batch drawn from `step`; the loss is multiplied by `factor`. -> the batch."""
    x, y = batch(step)
    model.zero_grad()
    backward_on(model, x, y, factor)
    return x


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def norm(tensors):
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def around(name, model, base, **options):
    options = {"audit_every": 0} | ({"norm": name[-3:]} if name.startswith("energy") else {}) | options
    return CLASSES[name](model, base, **options)


def sgd(model, lr=0.5):
    return torch.optim.SGD(model.parameters(), lr=lr)


def batch(seed=0, rows=6):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=draw), torch.randint(4, (rows,), generator=draw)


def backward_on(model, x, y, factor=1.0):
    (factor * F.cross_entropy(model(x), y)).backward()


def joint(parameters):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(one, other):
    return all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def floats(measured):
    return {layer: float(value) for layer, value in measured.items()}
