"""What hooks keep of a run: the tensors that it holds, its packed model, weights of another."""

import functools
import types

import pytest
import torch
from torch import nn

from ebc_lab.components.init import archive_of, load
from ebc_lab.components.memory import reachable
from ebc_lab.components.quantizer import Flips, grouping_of, write_model
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.lowbit import inspect_packed, quantize
from ebc_lab.lowbit.ste import codes_of


class Holder:
    def __init__(self, value):
        self.value = value
        self.again = self

    def method(self):
        return self.value


def closed_over(value):
    return lambda: value


def empty_cell():
    def reads():
        return later

    return reads
    later = 1


@pytest.mark.parametrize(
    "around",
    [
        lambda t: t,
        lambda t: [1, "text", (None, {t})],
        lambda t: {"a": {2: t}},
        lambda t: {t: 1},
        Holder,
        lambda t: Holder(t).method,
        closed_over,
        lambda t: [empty_cell(), closed_over(closed_over(t))],
        lambda t: functools.partial(closed_over, Holder(t)).args,
        lambda t: types.SimpleNamespace(deep=[Holder({"x": frozenset([t])})]),
    ],
)
def test_every_tensor_is_found_that_an_object_leads_to(around):
    tensor = torch.ones(3)
    assert [id(t) for t in reachable(around(tensor))] == [id(tensor)]


def test_tensors_inside_of_a_wrapper_are_found():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape)
            made.inner = inner
            return made

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(tensors, meta, size, stride):
            return Wrapper(tensors["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    inner = torch.ones(3)
    assert [id(t) for t in reachable([Wrapper(inner)])] == [id(inner)]


@pytest.mark.parametrize("name", ["ternary", "five"])
def test_a_packed_model_and_the_share_of_codes_that_changed(make_gpt, tmp_path, name):
    model = make_gpt()
    config = QuantizerConfig(name, group="row")
    figures = write_model(tmp_path / "model", model, config)
    assert figures["packed_bytes"] == (tmp_path / "model").stat().st_size
    assert figures["model_bytes_float32"] == 4 * sum(p.numel() for p in model.parameters())
    told = inspect_packed(tmp_path / "model")
    assert {t["name"] for t in told["tensors"]} == {n for n, _ in model.named_parameters()}
    matrix = model.blocks[0].q.weight
    flips = Flips([matrix], config, audit_every=20)
    assert flips.at(5) is None
    assert flips.at(10) is None  # ten steps before an audit
    kept = flips.codes
    with torch.no_grad():
        matrix[0] *= -1
    resumed = Flips([matrix], config, audit_every=20)
    resumed.restore({t: codes.cpu() for t, codes in kept.items()})
    codes = codes_of(matrix, **grouping_of(config))
    changed = float((codes[0] != 0).sum()) / codes.numel()
    assert float(resumed.at(20)) == pytest.approx(changed)
    assert quantize(matrix, name, group="row").codes.shape == codes.shape


def test_weights_of_another_model_are_named_with_their_shapes(tmp_path):
    kept = types.SimpleNamespace(
        path=tmp_path / "weights.pt", archive=archive_of(nn.Linear(3, 2).state_dict())
    )
    own = nn.Linear(3, 2)
    load(kept, own)
    with pytest.raises(UserError, match=r"are another model's: weight is .*2, 3.* in the file and .*2, 4"):
        load(kept, nn.Linear(4, 2))
    with pytest.raises(
        UserError, match=r"are another model's: bias is .* in the file and not there in this run"
    ):
        load(kept, nn.Linear(3, 2, bias=False))
