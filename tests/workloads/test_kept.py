"""model.pt: the model that a run kept, as it was, and nothing else in its place."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from support.ebm_runs import eventful, tiny_ebm
from support.runs import made

from ebc_lab.config.errors import UserError
from ebc_lab.training.run import Training
from ebc_lab.workloads import kept as kept_module
from ebc_lab.workloads.kept import build, read_model, sampling_of, settings_of

KINDS = {
    "moe": ["ebm.adapt=gradient", "ebm.temperature=[4,2,1]"],
    "transformer": ["encoder=transformer", "decoder=transformer", "model.dropout=0.1"],
    "no splats": ["ebm.splats=0"],
    "hnsw": ["index=hnsw"],
}


def trained(text_file, folder, *overrides, steps=12):
    """A training after some steps, with every kind of event behind it."""
    run = tiny_ebm(text_file, *overrides)
    training = Training(eventful(run), made(folder))
    training.advance(steps)
    training.recording.close()
    return training


@pytest.fixture(scope="module", params=KINDS)
def kept(request, text_file, tmp_path_factory):
    """(training, model.pt) of a run of each kind."""
    folder = tmp_path_factory.mktemp("run")
    if request.param == "hnsw":
        pytest.importorskip("faiss")
    training = trained(text_file, folder, *KINDS[request.param])
    training.workload.finished(training.model, training.step, training.files)
    return training, training.files.model


@pytest.mark.thorough
def test_it_comes_back_bit_for_bit(kept):
    training, path = kept
    found = read_model(path)
    tokens = training.workload.tokens["val"][:32].view(2, 16)
    assert not found.model.training
    with torch.no_grad():
        assert torch.equal(found.model(tokens), training.model.eval()(tokens))
    assert (found.step, found.run, found.path) == (12, training.run_config, path)
    corpus = training.workload.corpus
    assert found.tokenizer.encode(corpus.text[:40]) == corpus.tokens()["train"][:40].tolist()
    assert found.curve == training.workload.curve
    names = {name for name, _ in training.model.named_parameters()}
    assert names == {name for name, _ in found.model.named_parameters()}
    if found.model.store is not None:
        states, contexts = found.model.encode(tokens)
        theirs = training.model.encode(tokens)
        assert torch.equal(found.model.energy(states, contexts), training.model.energy(*theirs))
        assert len(found.model.store) == len(training.model.store)
        assert torch.equal(found.model.store.nearest(states, 3), training.model.store.nearest(states, 3))
    before = path.read_bytes()
    training.workload.finished(training.model, training.step, training.files)
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def path(text_file, tmp_path_factory):
    training = trained(text_file, tmp_path_factory.mktemp("run"), steps=2)
    training.workload.finished(training.model, training.step, training.files)
    return training.files.model


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def changed(path, **content):
    whole = torch.load(path, weights_only=True)
    assert set(whole) == {"format", "run", "tokenizer", "step", "weights", "curve"}
    return saved({**whole, **content})


def other_sizes(path):
    """The settings of a model with another n over these weights."""
    run = json.loads(torch.load(path, weights_only=True)["run"])
    run["ebm"]["n"] = 9
    return changed(path, run=json.dumps(run))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def complex_weights(path):
    weights = torch.load(path, weights_only=True)["weights"]
    return changed(
        path, weights={n: w.to(torch.complex64) if n.endswith("weight") else w for n, w in weights.items()}
    )


def no_divisor(path):
    """Of the store's extra state, where its divisor and its index belong, is a tensor."""
    weights = torch.load(path, weights_only=True)["weights"]
    return changed(
        path, weights={n: torch.ones(2) if n.endswith("_extra_state") else w for n, w in weights.items()}
    )


BAD = {
    "complex": (complex_weights, "has complex numbers"),
    "truncated": (lambda path: path.read_bytes()[:5000], "is damaged, or no model of this program"),
    "pickle": (lambda path: saved({"format": Evil()}), "is damaged, or no model of this program"),
    "foreign": (
        lambda path: saved({"weights": torch.ones(3)}),
        "is no model of this program: give the model.pt of a run",
    ),
    "newer": (lambda path: changed(path, format=2), "has format 2, this version reads 1: train it again"),
    "a format of two": (lambda path: saved({"format": torch.ones(2)}), "is no model of this program"),
    "nothing else": (lambda path: saved({"format": 1}), "weights that do not fit its settings"),
    "other sizes": (other_sizes, "weights that do not fit its settings"),
    "no divisor": (no_divisor, "weights that do not fit its settings"),
    "half a run": (lambda path: changed(path, run='{"ebm": 3}'), "weights that do not fit its settings"),
    "other tokens": (
        lambda path: changed(path, tokenizer={"kind": "characters", "json": '{"characters": "ab"}'}),
        "weights that do not fit its settings",
    ),
    "no tokens": (
        lambda path: changed(path, tokenizer={"kind": "characters", "json": "[]"}),
        "the kept tokenizer holds no list of different characters",
    ),
}


@pytest.mark.parametrize("damage", BAD)
def test_what_is_no_model_is_refused_in_one_sentence_and_never_executed(path, tmp_path, damage):
    make, words = BAD[damage]
    (tmp_path / "model.pt").write_bytes(make(path))
    with pytest.raises(UserError) as refused:
        read_model(tmp_path / "model.pt")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no model .*model\.pt: give a run folder of workload=ebm"):
        read_model(tmp_path / "model.pt")


@pytest.mark.thorough
def test_settings_of_a_run(text_file):
    run = tiny_ebm(text_file, "decoder.hidden_scale=1.5", "sampler=adjusted", "sampler.steps=7")
    settings = settings_of(run, 31)
    assert (settings.vocabulary, settings.n, settings.splats, settings.hidden) == (31, 8, 24, 24)
    assert settings.index == "exact"
    assert (sampling_of(run).sampler, sampling_of(run).steps) == ("adjusted", 7)
    before = torch.get_rng_state()
    first, second = build(run, 31), build(run, 31)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("context", "windows"), [(100, 5), (512, 1), (600, 1)])
def test_the_sampled_loss_is_of_about_five_hundred_tokens_and_a_chain_that_breaks_off_is_told(
    context, windows, monkeypatch
):
    asked = []

    def sampled(model, inputs, targets, sampling, chance, samples):
        asked.append((inputs.shape, samples, chance.initial_seed()))
        if samples == 3:
            raise ValueError("a latent is not finite")
        return {"settled": 1.0, "sampled": 2.0}

    monkeypatch.setattr(kept_module, "sampled_loss", sampled)
    monkeypatch.setattr(kept_module, "sampling_of", lambda run: None)
    one = SimpleNamespace(model=None, run=SimpleNamespace(model=SimpleNamespace(context=context), seed=7))
    ids = torch.arange(5000)
    found = {"tokens": windows * context, "samples": 2, "settled": 1.0, "sampled": 2.0}
    assert kept_module._sampled(one, ids, 2) == found
    broken = {"samples": 3, "settled": None, "sampled": None, "problem": "a latent is not finite"}
    assert kept_module._sampled(one, ids, 3) == found | broken
    assert asked == [((windows, context), 2, 7), ((windows, context), 3, 7)]
