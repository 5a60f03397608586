"""Models from a folder that transformers wrote: what INT8 changes, what still trains, and refusals."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

from ebc_lab.axiom.loading import load_model
from ebc_lab.axiom.memory import estimate_memory, weights_of

TOKENS = torch.arange(48).view(2, 24)
WIDTH = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama with an untied head and a tiny GPT-2 with a tied one, drawn from seed 0, and saved."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
    )
    gpt2 = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=4, initializer_range=0.05
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(root / "llama")
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    return root


both = pytest.mark.parametrize("family", ["llama", "gpt2"])


def distance(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.thorough
@both
def test_32_and_16_bits_are_the_model_that_was_saved(folders, family):
    exact = load_model(folders / family, bits=32)
    half = load_model(str(folders / family), bits=16)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for p, q in zip(exact.parameters(), half.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)
    assert all(p.requires_grad for p in [*exact.parameters(), *half.parameters()])
    assert weights_of(exact) == weights_of(folders / family)


@both
def test_in_8_bits_the_matrices_of_linear_layers_are_frozen_and_the_rest_trains(folders, family):
    pytest.importorskip("torchao")
    exact = load_model(folders / family, bits=32)
    model = load_model(folders / family, bits=8)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    frozen = ("_proj.weight", "c_attn.weight", "c_fc.weight")
    assert trains == {name: not name.endswith(frozen) for name, _ in exact.named_parameters()}

    with torch.no_grad():
        expected = exact(TOKENS).logits
        assert 0 < distance(model(TOKENS).logits, expected) < 0.03
    for tuned in (exact, model):
        logits = tuned(TOKENS).logits.float()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad
        if p.requires_grad:
            assert distance(p.grad, gradients[name]) < 0.06, name


@both
def test_8_bits_take_what_the_estimate_says_and_a_scale_a_row(folders, family):
    pytest.importorskip("torchao")
    model = load_model(folders / family)
    size = scales = 0
    for p in model.parameters():
        parts = [p.qdata, p.scale] if hasattr(p, "qdata") else [p]
        size += sum(part.numel() * part.element_size() for part in parts)
        scales += sum(part.numel() * part.element_size() for part in parts[1:])
    assert scales > 0
    assert size - scales == round(estimate_memory(folders / family)["int8_gb"] * 1e9)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "someone/something", "."])
def test_nothing_is_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"nothing is downloaded.*hf download NAME --local-dir FOLDER"
    ):
        load_model(name)


@pytest.mark.parametrize("bits", [4, 0, "8", True])
def test_other_bits_are_refused(bits, tmp_path):
    with pytest.raises(ValueError, match="32, 16 or 8; for 4, use BitsAndBytesConfig"):
        load_model(tmp_path, bits=bits)


@pytest.mark.parametrize("missing", ["transformers", "torchao"])
def test_a_missing_library_names_the_command_that_installs_it(missing, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    for module in (missing, f"{missing}.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {missing}.*pip install 'ebc-lab\[axiom\]'"):
        load_model(tmp_path)


OTHER_MODELS = ({"num_hidden_layers": 3}, {"intermediate_size": 96}, {"model_type": "unheard-of"})


@pytest.mark.parametrize("what", ["weights cut off", "no weights", "config cut off", *OTHER_MODELS], ids=str)
def test_a_damaged_folder_is_named_in_one_sentence(folders, what, tmp_path):
    folder = shutil.copytree(folders / "llama", tmp_path / "llama")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "weights cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no weights":
        weights.unlink()
    elif what == "config cut off":
        config.write_text('{"model_type": "lla')
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | what))
    with pytest.raises(ValueError, match=r"tmp|llama") as caught:
        load_model(folder, bits=32)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(
        "Error."
    )  # it says what is wrong, and not of which kind an error is
