"""Parameter names -> the groups that share one contribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebc_lab.ebc import group_parameters
from ebc_lab.ebc.options import GROUPINGS


def both(*modules):
    return [f"{module}.{part}" for module in modules for part in ("weight", "bias")]


# One or two blocks of each model, every parameter under the type that it is
GPT2 = {
    "embedding": ["transformer.wte.weight", "transformer.wpe.weight"],
    "attention": [
        n for i in (0, 1) for n in both(*(f"transformer.h.{i}.attn.{m}" for m in ("c_attn", "c_proj")))
    ],
    "mlp": [n for i in (0, 1) for n in both(*(f"transformer.h.{i}.mlp.{m}" for m in ("c_fc", "c_proj")))],
    "norm": [
        *(n for i in (0, 1) for n in both(f"transformer.h.{i}.ln_1", f"transformer.h.{i}.ln_2")),
        *both("transformer.ln_f"),
    ],
    "head": ["lm_head.weight"],
}
LLAMA = {
    "embedding": ["model.embed_tokens.weight"],
    "attention": [f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in "qkvo"],
    "mlp": [f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up", "down")],
    "norm": [
        *(f"model.layers.{i}.{m}_layernorm.weight" for i in (0, 1) for m in ("input", "post_attention")),
        "model.norm.weight",
    ],
    "head": ["lm_head.weight"],
}
_BERT_ATTENTION = ("self.query", "self.key", "self.value", "output.dense")
_LAYERS = [f"bert.encoder.layer.{i}" for i in (0, 1)]
BERT = {
    "embedding": [f"bert.embeddings.{m}_embeddings.weight" for m in ("word", "position", "token_type")],
    "attention": both(*(f"{at}.attention.{m}" for at in _LAYERS for m in _BERT_ATTENTION)),
    "mlp": both(*(f"{at}.{m}.dense" for at in _LAYERS for m in ("intermediate", "output"))),
    "norm": both(
        "bert.embeddings.LayerNorm",
        *(f"{at}.{m}.LayerNorm" for at in _LAYERS for m in ("attention.output", "output")),
        "cls.predictions.transform.LayerNorm",
    ),
    "head": [
        *both("bert.pooler.dense", "cls.predictions.transform.dense"),
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
    ],
}
NEOX = {
    "embedding": ["gpt_neox.embed_in.weight"],
    "attention": both("gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.0.attention.dense"),
    "mlp": both("gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.0.mlp.dense_4h_to_h"),
    "norm": both("gpt_neox.layers.0.input_layernorm", "gpt_neox.final_layer_norm"),
    "head": ["embed_out.weight"],
}
OPT = {
    "embedding": ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
    "attention": both(*(f"model.decoder.layers.0.self_attn.{m}_proj" for m in ("q", "k", "v", "out"))),
    "mlp": both("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"),
    "norm": both("model.decoder.layers.0.self_attn_layer_norm", "model.decoder.final_layer_norm"),
    "head": ["lm_head.weight"],
}
META_LLAMA = {
    "embedding": ["tok_embeddings.weight"],
    "attention": [f"layers.0.attention.w{m}.weight" for m in "qkvo"],
    "mlp": [f"layers.0.feed_forward.w{m}.weight" for m in "123"],
    "norm": ["layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight"],
    "head": ["output.weight"],
}
MODELS = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT, "neox": NEOX, "opt": OPT, "meta_llama": META_LLAMA}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def names_of(model):
    return [name for members in model.values() for name in members]


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
    assert group_parameters(["0.weight", "0.bias", "2.weight"]) == {
        "model": ["0.weight", "0.bias", "2.weight"]
    }


@models
def test_types_of_known_models(model):
    assert group_parameters(names_of(model), "type") == model


def test_what_has_no_known_type_is_other():
    assert group_parameters(["0.weight", "gate.scale"], "type") == {"other": ["0.weight", "gate.scale"]}


def test_matrices_of_the_gpt_are_its_hidden_matrices(make_gpt):
    model = make_gpt()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    hidden = [name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2]
    for known in (None, shapes):
        groups = group_parameters(shapes, "matrices", known)
        assert list(groups.items()) == [(name, [name]) for name in hidden]


@models
def test_matrices_of_known_models(model):
    groups = group_parameters(names_of(model), "matrices")
    assert groups == {
        n: [n] for n in names_of(model) if n in model["attention"] + model["mlp"] and n.endswith("weight")
    }


def test_matrices_of_torchs_own_encoder():
    layer = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False
    )
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    assert list(group_parameters(shapes, "matrices")) == [n for n, shape in shapes.items() if len(shape) == 2]


def test_a_head_with_a_projection_of_that_name_is_no_hidden_matrix():
    names = [
        "roberta.encoder.layer.0.attention.self.query.weight",
        "classifier.dense.weight",
        "classifier.out_proj.weight",
    ]
    assert list(group_parameters(names, "matrices")) == names[:1]


def test_matrices_are_two_dimensional():
    shapes = {"blocks.0.q.weight": (4, 4), "blocks.0.fc1.weight": (4, 4, 3), "blocks.0.fc2.weight": (4,)}
    assert list(group_parameters(shapes, "matrices", shapes)) == ["blocks.0.q.weight"]
    assert len(group_parameters(shapes, "matrices")) == 3


@pytest.mark.parametrize(
    "names", [[], ["wte.weight", "blocks.0.norm.weight", "blocks.0.q.bias", "head.weight"]]
)
def test_matrices_need_a_hidden_matrix(names):
    with pytest.raises(ValueError, match="grouping='matrices' found no hidden matrix"):
        group_parameters(names, "matrices")


all_names = [*sorted({name for model in MODELS.values() for name in names_of(model)}), "0.weight", "scale"]


@pytest.mark.parametrize("kind", GROUPINGS)
@given(names=st.lists(st.sampled_from(all_names), min_size=1, unique=True))
def test_every_name_is_in_exactly_one_group(kind, names):
    if kind == "matrices":
        names = [*names, "blocks.0.q.weight"]
    members = [name for group in group_parameters(names, kind).values() for name in group]
    assert len(members) == len(set(members))
    assert set(members) <= set(names) if kind == "matrices" else set(members) == set(names)


def test_the_finest_and_the_coarsest_grouping():
    names = names_of(LLAMA)
    assert group_parameters(names, "tensor") == {name: [name] for name in names}
    assert group_parameters(iter(names), "global") == {"all": names}


# -- groupings that were made elsewhere ----------------------------------------------------------------------


def test_a_mapping_is_taken_as_it_is():
    groups = {"cluster1": ("b", "a"), "cluster0": ["c"]}
    assert group_parameters(["a", "b", "c"], groups) == {"cluster1": ["b", "a"], "cluster0": ["c"]}
    assert list(group_parameters(["a", "b", "c"], groups)) == ["cluster1", "cluster0"]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"x": ["a", "b", "d"], "y": ["c"]}, "'d' is unknown"),
        ({"x": ["a", "b"], "y": ["b", "c"]}, "'b' is in two places"),
        ({"x": ["a", "a", "b", "c"]}, "'a' is in two places"),
        ({"x": ["a"], "y": ["c"]}, "'b' is in no group"),
        ({"x": ["a", "b", "c"], "y": []}, "'y' is without a parameter"),
        ({}, "'a', 'b', 'c' is in no group"),
    ],
)
def test_a_mapping_that_does_not_hold_each_name_once_is_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        group_parameters(["a", "b", "c"], groups)
