"""Parameter names -> the groups that share one contribution."""

import pytest

from ebc_lab.ebc import group_parameters


def test_blocks_of_the_gpt(make_gpt):
    names = [name for name, _ in make_gpt().named_parameters()]
    groups = group_parameters(names)
    assert list(groups) == ["embeddings", "block0", "block1", "head"]
    assert groups["embeddings"] == ["token_embedding.weight", "position_embedding.weight"]
    assert groups["head"] == ["norm.weight", "head.weight"]
    assert all(name.startswith("blocks.1.") for name in groups["block1"])
    assert [name for members in groups.values() for name in members] == names


@pytest.mark.parametrize("blocks", ["transformer.h", "model.layers", "block", "layer"])
def test_other_spellings_of_a_block(blocks):
    names = ["wte.weight", f"{blocks}.0.mlp.weight", f"{blocks}.11.mlp.weight", "ln_f.weight"]
    assert list(group_parameters(names)) == ["embeddings", "block0", "block11", "head"]


def test_a_model_without_blocks_is_one_group():
    assert group_parameters(["0.weight", "0.bias", "2.weight"]) == {"model": ["0.weight", "0.bias", "2.weight"]}


def test_an_unknown_grouping_is_refused():
    with pytest.raises(ValueError, match="grouping='colour' is unknown"):
        group_parameters(["a"], "colour")
