"""The models beside the GPT: rotary positions and normed attention, a GRU, and a CNN and a ViT on images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.runs import assert_run_resumes

from ebc_lab.config.checks import validate_run, warnings_of
from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.parts import with_sources
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.workloads.custom import OwnModelWorkload
from ebc_lab.workloads.digits import digits
from ebc_lab.workloads.gpt import GPT, drawn, hidden_matrices
from ebc_lab.workloads.gru import GRU
from ebc_lab.workloads.images import CNN, ImageBatches, ViT
from ebc_lab.workloads.modern import ModernGPT, rotated, rotations
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text

CONFIG = ModelConfig(blocks=2, width=16, heads=2, context=12)
VOCABULARY = 10
MODELS = {"gpt": GPT, "modern": ModernGPT, "gru": GRU, "cnn": CNN, "vit": ViT}
LIMITED = {  # budgets that measure and that take derivatives, a trust region, Muon on each one's matrices
    "modern": "model=modern stabilizer=ebc budget=tracked",
    "gru": "model=gru stabilizer=ebc budget=surrogate budget.grouping=block",
    "cnn": "workload=images stabilizer=ebc budget=surrogate budget.probe_sequences=16 batch_size=40",
    "vit": "workload=images model=vit stabilizer=trust_region stabilizer.strength=0.5 batch_size=64 "
    "dtype=bfloat16",
}


@pytest.mark.parametrize("name", ["gpt", "modern", "vit"])
def test_what_a_norm_is_given_under_autocast_is_in_float32(name):
    """On a CPU LayerNorm adds up the gradient of its weights in the dtype of its input."""
    model = MODELS[name](replace(CONFIG, name=name), VOCABULARY)
    given = []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs_of(name))
    assert len(given) == {"gpt": 5, "modern": 9, "vit": 5}[name]  # modern: of queries and keys too
    assert set(given) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eps_of_its_norms_is_the_one_that_torch_takes(dtype):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).mul(1e-4).to(dtype)
    norm = ModernGPT(CONFIG, VOCABULARY).norm
    assert torch.equal(F.rms_norm(x, (8,)), F.rms_norm(x, (8,), eps=norm.eps))


def inputs_of(name, rows=3):
    draw = torch.Generator().manual_seed(1)
    if name in ("cnn", "vit"):
        return torch.rand(rows, 1, 8, 8, generator=draw) * 2 - 1
    return torch.randint(VOCABULARY, (rows, 12), generator=draw)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_predicts_each_row_by_itself_and_no_token_from_later_ones(name):
    model = drawn(lambda: MODELS[name](replace(CONFIG, name=name), VOCABULARY), seed=0)
    again = drawn(lambda: MODELS[name](replace(CONFIG, name=name), VOCABULARY), seed=0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all(p.ndim == 2 and min(p.shape) >= 16 for p in hidden_matrices(model))
    with torch.no_grad():
        for p in hidden_matrices(model):
            p.mul_(5)  # so that attention and gates matter
        inputs = inputs_of(name)
        logits = model(inputs)
        assert logits.shape == (3, 1 if name in ("cnn", "vit") else 12, VOCABULARY)
        torch.testing.assert_close(model(inputs[1:2])[0], logits[1])
        if inputs.ndim == 2:
            inputs[:, 7] = (inputs[:, 7] + 1) % VOCABULARY
            moved = (model(inputs) - logits).abs().amax((0, 2))
            assert moved[:7].max() < 1e-6
            assert moved[7:].min() > 1e-6
        else:
            inputs[..., -1, -1] += 1  # the last corner reaches the prediction
            assert (model(inputs) - logits).abs().amin() > 1e-6
        if name == "vit":  # and the first patch: nothing is masked
            patches = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
            before = model.blocks[0](patches, 1)[0]
            patches[-1] += torch.arange(16.0)
            assert (model.blocks[0](patches, 1)[0] - before).abs().amax() > 1e-6


def test_rotary_scores_depend_on_the_distance():
    cos, sin = rotations(12, 8)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 12, 8)
    scores = rotated(q, cos, sin) @ rotated(k, cos, sin).T  # by position of the query, and of the key
    for offset in range(-11, 12):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1


@pytest.mark.parametrize("name", LIMITED)
def test_a_limited_run_resumes_to_the_same_bits(tmp_path, text_file, name):
    asked = ["scale=smoke", "steps=20", "eval_every=10", "model.blocks=1", "model.width=16", "seed=3"]
    asked += ["optimizer=muon", "optimizer.lr=1e-2", "threads_per_run=1", "device=cpu", "compile=off"]
    asked += [] if "images" in LIMITED[name] else ["data=path", f"data.file={text_file}", "model.context=16"]
    asked += [] if "dtype" in LIMITED[name] else ["dtype=float32"]
    run = run_part(compose([*asked, *LIMITED[name].split()], study=False))
    run = pinned(run, *checked_text(run))
    whole = assert_run_resumes(run, tmp_path, (5, 13))
    assert whole["val_loss"] < whole["curve"][0][1]
    of_text = "images" not in LIMITED[name]
    assert (whole["test_bits_per_char"] is not None) == of_text
    assert of_text or whole["test_accuracy"] * 360 == pytest.approx(round(whole["test_accuracy"] * 360))


def test_every_image_is_in_one_split_and_once_in_every_epoch():
    from sklearn.datasets import load_digits

    parts = digits()
    assert {split: len(images.classes) for split, images in parts.items()} == {
        "train": 1078,
        "val": 359,
        "test": 360,
    }
    joined = np.concatenate([images.pixels for images in parts.values()])
    known = load_digits().images.astype(np.uint8)
    assert sorted(map(bytes, joined)) == sorted(map(bytes, known))
    images = torch.arange(10.0).view(10, 1, 1, 1)
    batches = ImageBatches(images, torch.arange(10)[:, None], 4, seed=1)
    drawn_rows = torch.cat([batches.at(step)[1][:, 0] for step in range(5)])
    first, second = drawn_rows.split(10)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()
    fresh = ImageBatches(images, torch.arange(10)[:, None], 4, seed=1)
    assert torch.equal(fresh.at(3)[1], batches.at(3)[1])


REFUSED = {  # beside what workload=images stands for
    "takes model=cnn or vit, not model=gpt": {"model": {"name": "gpt"}},
    "takes data=digits, not data=pydoc": {"data": {"name": "pydoc"}},
    "leave model.context=1": {"model": {"context": 16}},
    "does not go with tokens": {"tokens": {"name": "bpe"}},
    "does not go with budget.probe_tokens=held": {"budget": {"probe_tokens": "held"}},
    "is not compiled": {"compile": "on"},
    "model.dropout goes with model=gpt": {"model": {"dropout": 0.1}},
    "not those of model=cnn": {"budget": {"grouping": "matrices"}},
    "data=digits is images": {"workload": {"name": "gpt"}},
    "model=cnn is a model of images": {"workload": {"name": "gpt"}, "data": {"name": "pydoc"}},
    "determinism=verity does not go with": {"determinism": {"name": "verity"}},
}
OF_TEXT = {
    "model=gru has torch's": {"model": {"name": "gru"}, "quantizer": {"name": "ternary"}},
    "twice model.heads=4": {"model": {"name": "modern", "width": 20}},
    "leave model=gpt": {"model": {"name": "modern"}, "workload": {"name": "ebm"}},
}


def test_what_a_model_cannot_be_is_refused():
    images = run_part(compose(["workload=images", "scale=smoke", "stabilizer=ebc"], study=False))
    assert (images.data.name, images.model.name, images.model.context) == ("digits", "cnn", 1)
    assert any("so few images" in warning for warning in warnings_of(images))
    for run, table in ((images, REFUSED), (RunConfig(), OF_TEXT)):
        for words, settings in table.items():
            with pytest.raises(UserError) as refused:
                validate_run(changed(run, settings))
            assert words in str(refused.value)


OWN_MODEL = """
from torch import nn

def made(vocabulary, context):
    return nn.Sequential(nn.Embedding(vocabulary, 4), nn.Dropout(0.5), nn.Linear(4, vocabulary))
"""


def test_a_model_of_ones_own_is_drawn_from_the_runs_seed_and_handed_over_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_model_of_ones_own.py").write_text(OWN_MODEL)
    run = RunConfig(model=ModelConfig("custom", context=8, target="a_model_of_ones_own:made"))

    def built(seed):
        workload = OwnModelWorkload.__new__(OwnModelWorkload)
        workload.run, workload.vocabulary = with_sources(replace(run, seed=seed)), 5
        before = torch.get_rng_state()
        model = workload.build()
        assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
        assert all(module.training for module in model.modules())
        return [p.tolist() for p in model.parameters()]

    first = built(1)
    torch.rand(3)
    assert first == built(1) != built(2)
