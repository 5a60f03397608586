"""`sharpness_every`: the Hessian's largest eigenvalue, beside a run that nothing of it changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.runs import ebc, plain, resumed_after, short_run, untimed
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebc_lab.components.hook import Built
from ebc_lab.components.sharpness import Sharpness, largest_eigenvalue
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StabilizedOptimizer, StepInputs
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record

MEASURED = ("sharpness", "preconditioned_sharpness")


@pytest.fixture
def run(tiny):
    return short_run(tiny, "steps=25")


def test_what_is_not_finite_has_no_eigenvalue_and_leaves_the_vector():
    start = torch.tensor([0.6, 0.8])
    value, vector = largest_eigenvalue(lambda v: v * torch.nan, start, 2)
    assert value.isnan()
    assert torch.equal(vector, start)
    value, vector = largest_eigenvalue(lambda v: v * torch.tensor([3.0, 1.0]), start, 2)
    torch.testing.assert_close(value, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(vector.abs(), torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)


def test_it_is_the_largest_eigenvalue_of_the_dense_hessian_under_adam_between_its_factors(
    make_gpt, batches, train
):
    model = make_gpt(width=4, blocks=1, heads=1)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = StabilizedOptimizer(model, adam)
    data = batches(13)
    run = RunConfig(sharpness_every=1, audit_tokens=48, model=replace(RunConfig().model, context=16))
    sharpness = Sharpness(run, Built(model, [], optimizer, 0))
    rows = data[-1][:3]  # 48 tokens
    inputs = StepInputs(12, data[-1][:, :-1], targets=data[-1][:, 1:])
    assert list(sharpness.before(0, inputs)) == ["sharpness"]  # Adam has seen no gradient
    twin = Sharpness(run, Built(model, [], optimizer, 0))
    twin.load_state_dict(sharpness.state_dict())
    assert torch.equal(twin.state_dict()["sharpness"], sharpness.state_dict()["sharpness"])
    for wrong in ({}, {"sharpness": 1}, {"sharpness": torch.zeros(3)}):
        with pytest.raises(ValueError, match="its vectors are not this run's"):
            twin.load_state_dict(wrong)
    assert Sharpness(replace(run, sharpness_every=2), Built(model, [], optimizer, 0)).before(1, inputs) == {}
    train(model, optimizer, data[:-1])
    for _ in range(4):  # it goes on from where it was
        found = sharpness.before(12, inputs)

    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(model, weights, rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    with sdpa_kernel(SDPBackend.MATH):
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        dense = torch.autograd.functional.hessian(loss, flat, vectorize=True).double()
    moments = [adam.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]
    factor = ((torch.cat(moments) / (1 - 0.999**12)).sqrt() + 1e-8).rsqrt().double()
    for column, matrix in zip(MEASURED, (dense, factor[:, None] * dense * factor), strict=True):
        largest = torch.linalg.eigvalsh(matrix)[-1].item()
        assert found[column].item() == pytest.approx(largest, rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("of", [plain, ebc])
def test_it_leaves_every_other_bit_of_a_run_as_it_is_also_of_one_that_was_interrupted(run, tmp_path, of):
    rows, results = {}, {}
    measuring = replace(of(run), sharpness_every=6)
    for name, one in (("without", of(run)), ("with", measuring)):
        results[name] = run_and_record(one, tmp_path / name, "x")
        rows[name] = read_columns(tmp_path / name / "steps.csv")
    for column, values in rows["without"].items():
        assert np.array_equal(values, rows["with"][column], equal_nan=True), column
    assert results["with"]["weights_checksum"] == results["without"]["weights_checksum"]
    assert not set(MEASURED) & set(rows["without"])
    assert np.flatnonzero(np.isfinite(rows["with"]["sharpness"])).tolist() == [0, 6, 12, 18, 24]
    assert (rows["with"]["sharpness"][[0, 6, 12, 18, 24]] > 0).all()

    resumed = resumed_after(measuring, tmp_path / "broken", (8, 15))
    assert untimed(resumed) == untimed(results["with"])
    assert (tmp_path / "with/steps.csv").read_bytes() == (tmp_path / "broken/steps.csv").read_bytes()
