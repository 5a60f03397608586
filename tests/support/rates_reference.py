"""The rivals that set the rate, as slow plain transcriptions of their papers: the tests compare with them.

Each takes a model, steps of torch's Adam at a rate `peak`, and a batch of the perceptron's at a time, and
returns the share of the peak rate at which it moved the weights. It imports nothing of the package.
"""

import math
import warnings

import numpy as np
import pytorch_optimizer
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class Plain:
    """W -> W + share·dW, with dW of Adam at the peak rate."""

    def __init__(self, model, peak):
        self.model = model
        self.peak = peak
        self.adam = torch.optim.Adam(model.parameters(), lr=peak)

    def loss(self, x, y):
        return F.cross_entropy(self.model(x), y)

    def at(self, weights, x, y):
        vector_to_parameters(weights, self.model.parameters())
        with torch.no_grad():
            return self.loss(x, y).item()

    def step(self, x, y):
        self.model.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        old = parameters_to_vector(self.model.parameters()).detach().clone()
        self.adam.step()
        update = parameters_to_vector(self.model.parameters()).detach() - old
        vector_to_parameters(old.clone(), self.model.parameters())
        share = min(1.0, self.rate(old, update, loss.item(), x, y) / self.peak)
        vector_to_parameters(old + share * update, self.model.parameters())
        return share


class GeN(Plain):
    """arXiv:2407.02772 and the authors' code: every eighth step, a parabola through three losses."""

    def __init__(self, model, peak):
        super().__init__(model, peak)
        self.lr = peak / 8
        self.count = 0

    def rate(self, old, update, loss, x, y):
        if self.count % 8 == 0:
            ratios = np.array([-1.0, 0.0, 1.0])
            losses = [self.at(old + r * self.lr / self.peak * update, x, y) for r in ratios]
            a, b, _ = np.polyfit(ratios * self.lr, losses, 2)
            curvature = 2 * a  # g'Hg
            fall = -b  # G'g
            if curvature > 0 and fall > 0:
                best = max(min(fall / curvature, self.lr * 2), self.lr / 2)
                self.lr = min(self.peak, 0.9 * self.lr + 0.1 * best)
        self.count += 1
        return self.lr


class CDAT(Plain):
    """arXiv:2407.06183: sigma·n/d, with n = max(-g'u, 0) and d = |u'Hu| averaged, by a product with H."""

    def __init__(self, model, peak, sigma):
        super().__init__(model, peak)
        self.sigma = sigma
        self.n = self.d = 0.0

    def rate(self, old, update, loss, x, y):
        weights = list(self.model.parameters())
        u = update / self.peak
        sizes = [w.numel() for w in weights]
        parts = [part.view_as(w) for part, w in zip(u.split(sizes), weights, strict=True)]
        gradients = torch.autograd.grad(self.loss(x, y), weights, create_graph=True)
        slope = sum((g * p).sum() for g, p in zip(gradients, parts, strict=True))
        product = torch.autograd.grad(slope, weights)
        curvature = sum((h * p).sum() for h, p in zip(product, parts, strict=True))
        self.n = 0.9 * self.n + 0.1 * max(-slope.item(), 0.0)
        self.d = 0.9 * self.d + 0.1 * abs(curvature.item())
        return self.sigma * self.n / self.d


class AdaptiveWarmUp(Plain):
    """arXiv:2602.05813 and the authors' code: gap/(K0 + K1·gap + K2·gap²), K fitted to a usual schedule."""

    div = 100.0
    sigma = 1e-3

    def __init__(self, model, peak, target):
        super().__init__(model, peak)
        self.target = target
        self.constants = None
        self.done = False

    def eta(self, gap, constants):
        k0, k1, k2 = constants
        return gap / (k0 + k1 * gap + k2 * gap**2)

    def fitted(self, first):
        """The peak's gap and K0, K1, K2, after trying 500 gaps."""
        entries = sum(w.numel() for w in self.model.parameters() if w.ndim == 2)
        best = (math.inf, None, None)
        for peak in np.linspace(0.01, first - 0.01, 500):
            k2 = first * (self.div - 1) / (self.peak * (first - peak) ** 2)
            constants = (k2 * peak**2, 1 / self.peak - 2 * k2 * peak, k2)

            def squared(x, peak=peak, constants=constants):
                if x < peak:
                    usual = self.peak * (1 - math.cos(math.pi * x / peak)) / 2
                else:
                    usual = self.peak + (self.peak / self.div - self.peak) * (x - peak) / (first - peak)
                near = math.exp(-((x - peak) ** 2) * self.sigma * entries / 2)
                return near * (self.eta(x, constants) - usual) ** 2

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = quad(squared, 0, first, points=[peak])[0]
            best = min(best, (value, peak, constants))
        return best[1:]

    def rate(self, old, update, loss, x, y):
        gap = loss - self.target
        if self.constants is None:
            self.peak_gap, self.constants = self.fitted(gap)
        self.done = self.done or gap <= self.peak_gap
        return self.peak if self.done else self.eta(gap, self.constants)


class AdaGC(Plain):
    """arXiv:2502.11034 as `pytorch_optimizer` has it: inside its Adam."""

    def __init__(self, model, peak, warm_up):
        super().__init__(model, peak)
        settings = {"weight_decay": 0.0, "warmup_steps": warm_up}
        self.adam = pytorch_optimizer.AdaGC(model.parameters(), lr=peak, **settings)

    def rate(self, *step):
        return self.peak
