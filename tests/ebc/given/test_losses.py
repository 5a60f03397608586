"""What a loss makes of a model's output, told from its gradient: which axis the classes are, what kind."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from ebc_lab.ebc.given.losses import (
    are_log_probabilities,
    doubt,
    gradient_of,
    refusal,
    unbalanced,
)
from ebc_lab.ebc.given.scales import written

B, T, V = 6, 9, 13


def numbers(*shape, seed=0, spread=2.0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape, seed=1, of=V):
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(seed))


def seen(output, loss, view=lambda z: z):
    """The logits, and the gradient of `loss(output)` by them."""
    output = output.detach().requires_grad_()
    loss(output).backward()
    logits = view(output.detach())
    return logits, gradient_of(logits, output.detach(), output.grad)


def judged(output, loss, view=lambda z: z):
    logits, gradient = seen(output, loss, view)
    return refusal(logits, gradient), doubt(gradient, are_log_probabilities(logits))


def entropy(z):
    return F.cross_entropy(z.flatten(0, -2), classes(B * T))


SOFTMAX = {
    "cross-entropy": entropy,
    "with ignored positions": lambda z: F.cross_entropy(
        z.flatten(0, 1), classes(B * T).masked_fill(classes(B * T) < 5, -100)
    ),
    "label smoothing and weights": lambda z: F.cross_entropy(
        z.flatten(0, 1), classes(B * T), torch.linspace(0.1, 3, V), label_smoothing=0.2
    ),
    "distillation": lambda z: F.kl_div(
        (z / 3).log_softmax(-1), numbers(B, T, V, seed=5).softmax(-1), reduction="batchmean"
    ),
    "a policy with an entropy": lambda z: (
        (numbers(B, T, seed=3) * z.log_softmax(-1)[..., 0]).mean()
        + 0.01 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    ),
    "a large z-loss": lambda z: entropy(z) + 0.005 * z.logsumexp(-1).square().mean(),
    "two labels": lambda z: 0.3 * entropy(z) + 0.7 * F.cross_entropy(z.flatten(0, 1), classes(B * T, seed=2)),
    "distillation at temperature 1": lambda z: F.kl_div(
        z.log_softmax(-1), numbers(B, T, V, seed=5).softmax(-1), reduction="batchmean"
    ),
    "distillation from a sharper self": lambda z: F.kl_div(
        z.log_softmax(-1), (2.5 * z.detach() + numbers(B, T, V, seed=5)).softmax(-1), reduction="batchmean"
    ),
    "labels and a teacher at temperature 4": lambda z: (
        entropy(z)
        + 16
        * F.kl_div((z / 4).log_softmax(-1), (numbers(B, T, V, seed=5) / 4).softmax(-1), reduction="batchmean")
    ),
    "focal": lambda z: (
        (-(-F.cross_entropy(z.flatten(0, 1), classes(B * T), reduction="none")).expm1()).square()
        * F.cross_entropy(z.flatten(0, 1), classes(B * T), reduction="none")
    ).mean(),
    "an entropy bonus": lambda z: entropy(z) + 0.3 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "a policy of both signs": lambda z: (
        numbers(B * T, seed=3) * F.cross_entropy(z.flatten(0, 1), classes(B * T), reduction="none")
    ).mean(),
    "preferences": lambda z: (
        -F.logsigmoid(z.log_softmax(-1)[:3, :, 1].sum() - z.log_softmax(-1)[3:, :, 1].sum())
    ),
}


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (lambda z: F.cross_entropy(z[..., :9].flatten(0, 1), classes(B * T, of=9)), r"z\[..., :9\]"),
        (
            lambda z: F.cross_entropy(
                z.masked_fill(torch.arange(V) < 4, -math.inf).flatten(0, 1), 4 + classes(B * T, of=V - 4)
            ),
            r"z\.masked_fill\(mask, -torch\.inf\)",
        ),
    ],
)
def test_classes_that_the_loss_leaves_out(loss, remedy):
    assert re.search(
        rf"hold \d\d% of the softmax.*logits_of=lambda z: {remedy}", judged(numbers(B, T, V), loss)[0]
    )


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 2.0])
def test_losses_of_a_softmax_are_taken_as_they_are(name, dtype, spread):
    logits = numbers(B, T, V, spread=spread).to(dtype)
    assert judged(logits, lambda z: SOFTMAX[name](z.float())) == (None, None)


def test_log_probabilities_are_logits():
    z = numbers(B, T, V).log_softmax(-1)
    assert judged(z, lambda z: F.nll_loss(z.flatten(0, 1), classes(B * T))) == (None, None)


@pytest.mark.parametrize("shape", [(B, V, T), (B, V, 5, 7)])
def test_classes_on_another_axis_are_refused_and_right_as_the_sentence_says(shape):
    def loss(z):
        return F.cross_entropy(z, classes(B, *shape[2:]))

    wrong, _ = judged(numbers(*shape), loss)
    assert "the classes are axis 1" in wrong
    assert "logits_of=lambda z: z.movedim(1, -1)" in wrong
    assert judged(numbers(*shape), loss, lambda z: z.movedim(1, -1)) == (None, None)
    wrong, _ = judged(numbers(*shape).log_softmax(1), lambda z: F.nll_loss(z, classes(B, *shape[2:])))
    assert "axis 1" in wrong


@pytest.mark.parametrize("sizes", [(5, 2, 2), (2,) * 9, (4, 9)])
def test_several_softmaxes_are_refused(sizes):
    def loss(z):
        chosen = [classes(B * T, of=n) for n in sizes]
        parts = z.flatten(0, 1).split(sizes, -1)
        return sum(F.cross_entropy(part, c) for part, c in zip(parts, chosen, strict=True))

    wrong, _ = judged(numbers(B, T, sum(sizes)), loss)
    assert f"several softmaxes, the first of {sizes[0]} classes" in wrong


@pytest.mark.parametrize("rare", [0.01, 0.02, 0.03, 0.1])
def test_a_rare_class_is_no_softmax_of_its_own(rare):
    z = numbers(200, T, V, spread=0.1)
    z[..., [0, -1]] += math.log(V * rare)
    targets = torch.distributions.Categorical(logits=z.flatten(0, 1)).sample()
    assert judged(z, lambda z: F.cross_entropy(z.flatten(0, 1), targets)) == (None, None)


def test_classes_that_are_never_meant_are_no_softmax_of_their_own():
    z = numbers(B, T, V)
    z[..., :4] = -30.0
    assert judged(z, lambda z: F.cross_entropy(z.flatten(0, 1), 4 + classes(B * T, of=V - 4))) == (None, None)


def test_the_second_of_two_logits_that_is_a_probability():
    p = numbers(B, T).sigmoid()
    pair = torch.stack([torch.zeros_like(p), p], -1)
    assert "(1 - p).log(), p.log()" in refusal(pair, None)
    assert refusal(pair.logit().nan_to_num(neginf=0.0), None) is None


def test_probabilities_are_refused():
    wrong, _ = judged(
        numbers(B, T, V).softmax(-1), lambda p: F.nll_loss(p.log().flatten(0, 1), classes(B * T))
    )
    assert "returns probabilities" in wrong
    assert "logits_of=torch.log." in wrong
    wrong, _ = judged(numbers(1, V).softmax(-1), lambda p: -p.log()[0, 3])  # of one row, as a policy's
    assert "logits_of=torch.log." in wrong
    wrong, _ = judged(numbers(B, V, T).softmax(1), lambda p: F.nll_loss(p.log(), classes(B, T)))
    assert "lambda p: p.movedim(1, -1).log()" in wrong
    labels = classes(B, V, of=2).float()
    wrong, _ = judged(numbers(B, V).sigmoid(), lambda p: F.binary_cross_entropy(p, labels))
    assert "(1 - p).log(), p.log()" in wrong


@pytest.mark.parametrize("share", [0.5, 0.03])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_by_themselves_are_refused(share, dtype):
    labels = (torch.rand((64, V), generator=torch.Generator().manual_seed(2)) < share).float()
    logits = numbers(64, V).to(dtype)

    def loss(z):
        return F.binary_cross_entropy_with_logits(z.float(), labels)

    wrong, _ = judged(logits, loss)
    assert "a label of its own" in wrong
    assert "torch.stack([torch.zeros_like(z), z], -1)" in wrong


@pytest.mark.parametrize("spread", [0.02, 2.0])
def test_one_label_in_each_row_by_itself_is_no_softmax(spread):
    """With the bias of an untrained head at its odds, such a gradient sums to zero over the classes."""
    y = F.one_hot(classes(B * T, of=100), 100).float().view(B, T, 100)
    z = numbers(B, T, 100, spread=spread) - math.log(99)
    logits, gradient = seen(z, lambda z: F.binary_cross_entropy_with_logits(z, y))
    assert unbalanced(gradient.rows, -1) < (0.02 if spread < 1 else 1)
    assert "a label of its own" in refusal(logits, gradient)


FACTORS = {"30 * z": 30.0, "z / 0.07": 1 / 0.07, "z / 5": 0.2, "12.7 * z": 12.7}


@pytest.mark.parametrize("written", FACTORS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes_", [5, 100])
def test_a_factor_in_the_loss_is_refused_with_its_remedy(written, smoothing, classes_):
    z = numbers(B, T, classes_, spread=0.3)
    y = classes(B * T, of=classes_)

    def loss(z):
        return F.cross_entropy((FACTORS[written] * z).flatten(0, 1), y, label_smoothing=smoothing)

    wrong, _ = judged(z, loss)
    assert f"logits_of=lambda z: {written} (where the factor is learnt" in wrong
    logits, gradient = seen(z * FACTORS[written], lambda z: loss(z / FACTORS[written]))
    assert refusal(logits, gradient) is None


def test_a_factor_is_told_from_the_gradient_in_bfloat16():
    wrong, _ = judged(numbers(64, V).bfloat16(), lambda z: F.cross_entropy(z * 10, classes(64)))
    assert "logits_of=lambda z: 10 * z" in wrong


def test_two_temperatures_are_not_one_factor_where_rounding_hides_the_difference():
    y = classes(54)
    z = numbers(54, V, spread=0.1).bfloat16()
    assert judged(z, lambda z: 0.3 * F.cross_entropy(z, y) + 0.7 * F.cross_entropy(2 * z, y))[0] is None


@pytest.mark.parametrize("hardness", [20, 30])
def test_a_factor_before_sharper_targets_is_refused(hardness):
    z = numbers(B, T, 64, spread=0.15)
    q = (hardness * (z + numbers(B, T, 64, seed=4, spread=0.02))).softmax(-1)
    wrong, _ = judged(z, lambda z: -(q * (10 * z).log_softmax(-1)).sum(-1).mean())
    assert "logits_of=lambda z: 10 * z, or about that" in wrong or "logits_of=lambda z: 9." in wrong


def test_a_factor_of_two_classes_and_of_labels_by_themselves():
    wrong, _ = judged(numbers(64, 2), lambda z: F.cross_entropy(8 * z, classes(64, of=2)))
    assert "let logits_of return 8 * z" in wrong
    assert judged(numbers(64, 2), lambda z: F.cross_entropy(z, classes(64, of=2))) == (None, None)
    labels = classes(B, T, V, of=2).float()
    wrong, _ = judged(numbers(B, T, V), lambda z: F.binary_cross_entropy_with_logits(8 * z, labels))
    assert "torch.stack([torch.zeros_like(z), 8 * z], -1)" in wrong


def pairs(z, rows, columns):
    own = torch.randperm(len(z), generator=torch.Generator().manual_seed(2))
    return rows * F.cross_entropy(z, own) + columns * F.cross_entropy(z.T, own.argsort())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softmax_over_columns_is_refused(dtype):
    z = (numbers(24, 24) + numbers(24, seed=1)).to(dtype)
    wrong, _ = judged(z, lambda z: pairs(z.float(), 0.5, 0.5))
    assert (
        "logits_of=lambda z: torch.stack([z, z.T], 1), z being these logits, and probe_sequences=24" in wrong
    )
    wrong, _ = judged(z, lambda z: pairs(z.float(), 0, 1))
    assert "logits_of=lambda z: z.T, z being" in wrong
    wrong, _ = judged(z, lambda z: pairs(10 * z.float() / 3, 0.5, 0.5))
    assert "torch.stack([(z / 0.3), (z / 0.3).T], 1)" in wrong
    assert judged(z, lambda z: pairs(z.float(), 1, 0)) == (None, None)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.mse_loss(z, numbers(B, T, V, seed=7)),
        lambda z: F.binary_cross_entropy_with_logits(
            z, (numbers(B, T, V, seed=7) > 0).float(), weight=torch.linspace(1, 90, V)
        ),
        lambda z: F.smooth_l1_loss(z[..., 0], numbers(B, T, seed=7)),
    ],
)
def test_other_losses_are_doubted(loss):
    wrong, doubted = judged(numbers(B, T, V), loss)
    assert wrong is None
    assert "not one of a softmax over the last axis" in doubted


def test_logits_that_look_like_probabilities_are_taken_for_logits():
    """Those of a saturated classifier are 0 and 1 in every row."""
    z = torch.tensor([0.0, 1.0]).expand(B, T, 2).clone()
    assert refusal(z, None) is None
    z = numbers(B, T, V).softmax(-1)
    assert refusal(z, None) is not None
    assert judged(z, entropy) == (None, None)  # they are given to a softmax once more


def test_without_a_gradient_nothing_is_said():
    logits, gradient = seen(numbers(B, T, V), lambda z: (z * 0).sum())
    assert not gradient.usable
    assert refusal(logits, gradient) is None
    assert doubt(gradient, False) is None
    _, gradient = seen(numbers(B, T, V), lambda z: (z * torch.inf).sum())
    assert not gradient.usable
    assert refusal(logits, None) is None


def test_the_gradient_of_a_view_is_that_of_its_elements():
    pair = numbers(2, B, V, T)
    _, gradient = seen(pair, lambda z: (z * pair).sum(), lambda z: z[1].movedim(1, -1))
    assert torch.equal(gradient.rows, pair[1].movedim(1, -1))


def test_the_gradient_of_two_backward_passes_is_their_sum():
    z = numbers(B, T, V)
    _, one = seen(z, entropy)
    _, other = seen(z, lambda z: 2 * z.square().mean())
    _, both = seen(z, lambda z: entropy(z) + 2 * z.square().mean())
    together = one + other
    torch.testing.assert_close(together.rows, both.rows)
    assert together.mass == pytest.approx(one.mass + other.mass)


@pytest.mark.parametrize(
    ("factor", "offset", "text"),
    [
        (30.0, 0.0, "30 * z"),
        (1 / 0.07, 0.0, "z / 0.07"),
        (2.5, 0.0, "z / 0.4"),
        (0.5, 0.0, "z / 2"),
        (1 / 3, 0.01, "z / 3"),
        (1.2345, 0.0, "z / 0.81"),
        (30.0, -4.595, "30 * z - 4.59"),
        (0.1, 0.0101, "z / 10 + 0.0101"),
    ],
)
def test_a_factor_is_written_as_somebody_would_write_it(factor, offset, text):
    assert written(factor, offset) == text
