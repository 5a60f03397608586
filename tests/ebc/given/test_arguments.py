"""What a forward is called with, by name: what EBC leaves out, and which positions count."""

import pytest
import torch
from torch import nn

from ebc_lab.ebc.given.arguments import Arguments


class Model(nn.Module):
    def forward(self, ids, attention_mask=None, targets=None, scale=1.0):
        return ids


class Open(nn.Module):
    def forward(self, *args, **kwargs):
        return args


IDS = torch.zeros(4, 3, dtype=torch.long)
MASK = torch.ones(4, 3)


def test_what_only_the_loss_needs_is_left_out_wherever_it_is_given():
    arguments = Arguments(Model(), ("targets",), None)
    batch, dropped = arguments.kept((IDS, MASK, IDS, 2.0), {})
    assert batch["args"][0] is IDS
    assert batch["args"][1] is MASK
    assert len(batch["args"]) == 2
    assert batch["kwargs"] == {"scale": 2.0}  # what stands behind it is given by name
    assert dropped
    batch, dropped = arguments.kept((IDS,), {"targets": IDS})
    assert (len(batch["args"]), batch["kwargs"], dropped) == (1, {}, True)
    assert not arguments.kept((IDS, MASK), {"scale": 1.0})[1]


def test_an_input_that_is_called_labels_stays():
    class Generator(nn.Module):
        def forward(self, noise, labels):
            return noise

    batch, dropped = Arguments(Generator(), None, None).kept((IDS, MASK), {})
    assert batch["args"][1] is MASK
    assert not dropped
    assert Arguments(Generator(), ("labels",), None).kept((IDS, MASK), {})[1]


def test_a_batch_in_one_mapping_is_read_by_its_keys():
    arguments = Arguments(Open(), None, None)
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    batch, dropped = arguments.kept((given,), {})
    assert list(batch["args"][0]) == ["input_ids", "attention_mask"]
    assert dropped
    assert arguments.mask((given,), {}, (4, 3)) is MASK


def test_a_mask_is_found_by_position_and_by_name():
    arguments = Arguments(Model(), None, None)
    assert arguments.mask((IDS, MASK), {}, (4, 3)) is MASK
    assert arguments.mask((IDS,), {"attention_mask": MASK}, (4, 3)) is MASK
    assert arguments.mask((IDS, MASK), {}, (4,)) is None  # a classifier has a row of logits for each row
    assert arguments.mask((IDS, MASK), {}, None) is MASK
    decoder = torch.ones(4, 5)
    both = {"attention_mask": MASK, "decoder_attention_mask": decoder}
    assert arguments.mask((), both, (4, 5)) is decoder


def test_somebody_may_say_which_positions_count():
    arguments = Arguments(Model(), None, lambda given: given["ids"] != 0)
    mask = arguments.mask((IDS, MASK), {}, (4, 3))
    assert not mask.any()
    wrong = Arguments(Model(), None, lambda given: given["ids"][:, 0] != 0)
    with pytest.raises(
        ValueError, match=r"mask_of returned a mask of shape \(4,\), for positions of \(4, 3\)"
    ):
        wrong.mask((IDS,), {}, (4, 3))
    lacking = Arguments(Model(), None, lambda given: given["mask"])
    with pytest.raises(ValueError, match="mask_of asks for 'mask', and the forward was given ids"):
        lacking.mask((IDS,), {}, (4, 3))
    with pytest.raises(ValueError, match="was given nothing by name"):
        Arguments(Open(), None, lambda given: given["mask"]).mask((IDS,), {}, (4, 3))


@pytest.mark.parametrize(
    ("cut", "args", "kwargs"),
    [
        (lambda given, index: given["ids"][index], 1, []),
        (lambda given, index: (given["ids"][index], None), 2, []),
        (lambda given, index: {"ids": given["ids"][index]}, 0, ["ids"]),
    ],
)
def test_rows_are_cut_as_somebody_says(cut, args, kwargs):
    arguments = Arguments(Model(), None, None, rows_of=cut)
    found = arguments.rows({"args": (IDS, MASK), "kwargs": {}}, torch.tensor([2, 0]))
    assert (len(found["args"]), list(found["kwargs"])) == (args, kwargs)
    [rows] = [*found["args"][:1], *found["kwargs"].values()]
    assert torch.equal(rows, IDS[[2, 0]])


def test_an_encoder_decoder_keeps_its_labels():
    class Config:
        is_encoder_decoder = True

    model = Model()
    model.config = Config()
    assert Arguments(model, None, None).drop == ()
    assert Arguments(Model(), None, None).drop == ("labels", "num_items_in_batch")
