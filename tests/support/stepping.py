"""Steps of a budgeted optimizer on the tiny GPT, and what a checkpoint must restore."""

import io

import torch

from ebc_lab.ebc import EllipsotopeClip

LR = 0.02  # too large for the tiny GPT, so that a budget of 0.01 nats clips


def adam_clip(model, **options):
    options = {"target_kl": 0.01, **options}
    return EllipsotopeClip(model, torch.optim.Adam(model.parameters(), lr=LR), **options)


def go(model, optimizer, batch, backward, **given):
    """One step on `batch`, (rows, 17) characters."""
    logits = backward(model, batch)
    return optimizer.step(batch[:, :-1], logits, targets=batch[:, 1:], **given)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def assert_resumes(build, data, backward):
    """`build()` -> (model, optimizer). After a checkpoint half-way, through a file, the same steps follow."""
    half = len(data) // 2
    model, optimizer = build()
    for batch in data[:half]:
        go(model, optimizer, batch, backward)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    expected = [go(model, optimizer, batch, backward) for batch in data[half:]]

    saved = torch.load(file, weights_only=True)
    resumed, optimizer = build()
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps = [go(resumed, optimizer, batch, backward) for batch in data[half:]]
    assert same(snapshot(resumed), snapshot(model))
    for got, want in zip(steps, expected, strict=True):
        for key, value in vars(want).items():
            other = getattr(got, key)
            if isinstance(value, torch.Tensor):
                assert torch.equal(other.nan_to_num(-1), value.nan_to_num(-1)), key
            else:
                assert other == value, key
