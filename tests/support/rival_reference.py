"""What the rivals are compared with: the authors' packages, or the papers' steps written out for one tensor.

A function of `AUTHORS` makes the authors' optimizer of a list of weights. One of `WRITTEN_OUT` takes a weight
and the gradients and rates of all steps, and returns the weight at the end; it computes in float32, in the
order of ours, so that bits can agree.
"""

import contextlib
import io

import torch
from dadaptation import DAdaptAdam
from dog import DoG, LDoG
from mechanic_pytorch import mechanize
from prodigyopt import Prodigy

GENERAL = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8}


def d_adaptation(weights):
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how it decays
        return DAdaptAdam(weights, **GENERAL, decouple=True)


AUTHORS = {
    "prodigy": lambda weights: Prodigy(weights, **GENERAL),
    "d_adaptation": d_adaptation,
    "dog": DoG,
    "ldog": LDoG,
    "mechanic": lambda weights: mechanize(torch.optim.AdamW)(weights, **GENERAL, weight_decay=0.0),
}


def adopt(w, gradients, rates, hidden):
    """Algorithm 2, the first gradient twice."""
    m = torch.zeros_like(w)
    v = gradients[0] * gradients[0]
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        scaled = g / v.sqrt().clamp(min=1e-6)
        m = m.lerp(scaled.clamp(-(t**0.25), t**0.25), 1 - 0.9)
        w = w.add(m, alpha=-lr)
        v = (v * 0.9999).addcmul(g, g, value=1 - 0.9999)
    return w


def on_its_sphere(w, u, lr, radius):
    """R unit(w - lr R unit(u))"""
    moved = w - lr * (u / u.norm()) * radius
    return moved * (radius / moved.norm())


def hyperball(w, gradients, rates, hidden):
    """Adam's update u: w <- R unit(w - lr R unit(u)), R the first norm; the rest by Adam at a tenth."""
    m, v, radius = torch.zeros_like(w), torch.zeros_like(w), w.norm()
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m = m.lerp(g, 1 - 0.9)
        v = (v * 0.999).addcmul(g, g, value=1 - 0.999)
        if hidden:
            u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            w = on_its_sphere(w, u, lr, radius)
        else:
            root = v.sqrt() / (1 - 0.999**t) ** 0.5 + 1e-8
            w = w.addcdiv(m, root, value=-(0.1 * lr / (1 - 0.9**t)))
    return w


def lionar(w, gradients, rates, hidden):
    """u, the sign of a Nesterov momentum: w <- R unit(w - lr R unit(u)); the rest by signs at a tenth."""
    m, radius = torch.zeros_like(w), w.norm()
    for g, lr in zip(gradients, rates, strict=True):
        m = m.lerp(g, 1 - 0.9)
        u = g.lerp(m, 0.9).sign()
        w = on_its_sphere(w, u, lr, radius) if hidden else w - 0.1 * lr * u
    return w


def quintic(x):
    """Five Newton-Schulz steps on the shorter side in bfloat16; same shape."""
    turned = x.shape[0] > x.shape[1]
    x = (x.T if turned else x).bfloat16()
    x = x / x.norm(dim=(0, 1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if turned else x


def scion(w, gradients, rates, hidden):
    """The unconstrained step: spectral for hidden matrices, signs for other tables, rms for vectors."""
    m = torch.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        m = m.lerp(g, 1 - 0.9)
        if hidden:
            u = quintic(m) * (w.shape[0] / w.shape[1]) ** 0.5
        elif w.ndim == 2:
            u = 60 * (m.sign() / w.shape[1])
        else:
            u = m / (m.square().mean().sqrt() + 1e-8)
        w = w.add(u, alpha=-lr)
    return w


def normuon(w, gradients, rates, hidden):
    """Algorithm 1 for hidden matrices; None for the rest, which is torch's Adam."""
    if not hidden:
        return None
    m, rows = torch.zeros_like(w), torch.zeros(w.shape[0], 1)
    for g, lr in zip(gradients, rates, strict=True):
        m = m.lerp(g, 1 - 0.95)
        u = quintic(g.lerp(m, 0.95)).float()
        rows = rows.lerp(u.square().mean(1, keepdim=True), 1 - 0.95)
        u = u / (rows.sqrt() + 1e-10)
        w = w.add(u * (0.2 * w.numel() ** 0.5 / u.norm()), alpha=-lr)
    return w


def muonclip(w, gradients, rates, hidden):
    """Algorithm 1 for hidden matrices where no logit exceeds its bound; None for the rest, torch's Adam."""
    if not hidden:
        return None
    m = torch.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        m = m * 0.95 + g
        w = w.add(quintic(m), alpha=-(lr * 0.2 * max(w.shape) ** 0.5))
    return w


WRITTEN_OUT = {f.__name__: f for f in (adopt, hyperball, lionar, scion, normuon, muonclip)}
