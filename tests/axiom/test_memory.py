"""What training takes, counted: golden values, transformers' own models, a plain count, and refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ebc_lab.axiom.__main__ import main
from ebc_lab.axiom.memory import (
    CLAIMS,
    KNOWN,
    Weight,
    compression_table,
    estimate_memory,
    known_name,
    quantised_layers,
    weights_of,
)
from ebc_lab.axiom.optimizer import AXIOM

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["estimate"]
TINY = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY_GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 9, "n_embd": 12, "n_layer": 2}


# -- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    found = estimate_memory(name)
    assert found.keys() == {*GOLDEN[name], "recommendation"}
    assert {key: found[key] for key in GOLDEN[name]} == pytest.approx(GOLDEN[name], rel=1e-12)


def test_the_table_of_true_compression():
    rows = {row["name"]: row for row in compression_table()}
    expected = {  # state at rank 0, 4, 16; gradients in 4, 2 bytes; both in 4, 2 bytes
        "laptop-gpt": [147, 31.4, 9.53, 9.39, 18.8, 17.6, 25.6],
        "gpt2": [774, 200, 68.2, 3.22, 6.45, 9.37, 18.2],
        "gpt2-large": [1112, 300, 106, 12.0, 24.1, 33.4, 62.2],
        "huggyllama/llama-7b": [4750, 1007, 305, 51.4, 103, 140, 256],
        "01-ai/Yi-1.5-34B": [7915, 1684, 511, 75.0, 150, 206, 382],
    }
    assert list(rows) == list(expected)
    for name, figures in expected.items():
        found = [times for kind in ("state", "gradients", "total") for times in rows[name][kind].values()]
        assert found == pytest.approx(figures, rel=4e-3)
    assert rows["gpt2-large"]["claims"] == {"total_compression": 170}


def test_the_laptop_gpt_is_the_lab_s():
    from ebc_lab.config.parts.model import ModelConfig
    from ebc_lab.workloads.gpt import build

    model = build(ModelConfig(context=64, width=128, blocks=3, heads=4), 65, seed=0)
    assert weights_of(model) == weights_of("laptop-gpt")
    assert estimate_memory(model)["axiom_state_gb"] == pytest.approx(156_968 / 1e9)
    assert estimate_memory(model, rank=0)["axiom_state_gb"] == pytest.approx(33_544 / 1e9)


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4), st.integers(0, 12))
def test_state_is_the_bytes_of_the_tensors_that_the_optimizer_keeps(shapes, rank):
    model = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in shapes])
    optimizer = AXIOM(model.parameters(), rank=rank)
    sum((p * p).sum() for p in model).backward()
    optimizer.step()
    kept = 0
    for state in optimizer.state.values():
        kept += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    assert estimate_memory(model, rank=rank)["axiom_state_gb"] == kept / 1e9


# -- where the weights come from -----------------------------------------------------------------------------


PARAMETERS = {
    "gpt2-medium": 354_823_168,
    "huggyllama/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "Qwen/Qwen-7B": 7_721_324_544,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "google/gemma-2-27b": 27_227_128_320,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "microsoft/phi-2": 2_779_683_840,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_models_have_the_number_of_weights_that_their_authors_state(name):
    assert estimate_memory(name)["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("GPT2-Large", "gpt2-large"),
        ("openai-community/gpt2", "gpt2"),
        ("Llama-7B", "huggyllama/llama-7b"),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("yi-1.5-34b", "01-ai/Yi-1.5-34B"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("someone/llama-7b", None),
        ("llama", None),
    ],
)
def test_short_names_in_any_case_but_no_other_owner(alias, name):
    assert known_name(alias) == name


def built(config):
    """The model of a configuration on the meta device, by transformers."""
    transformers = pytest.importorskip("transformers")
    given = {"n_head": 1} if config["model_type"] == "gpt2" else {"pad_token_id": 0}
    given |= {"rotary_dim": 2, "n_head": 2} if config["model_type"] == "gptj" else {}
    with torch.device("meta"):
        read = transformers.AutoConfig.for_model(**given | config)
        return transformers.AutoModelForCausalLM.from_config(read)


TWO_BLOCKS = {"n_layer": 2, "num_hidden_layers": 2}
BUILT = [known | TWO_BLOCKS for known in KNOWN.values() if known["model_type"] not in ("qwen", "ebc-gpt")]
GROUPED = TINY | {"num_key_value_heads": 2}
OTHERS = [
    TINY_GPT2 | {"n_inner": 7, "tie_word_embeddings": False},
    TINY | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    GROUPED | {"head_dim": 6, "attention_bias": True},
    GROUPED | {"model_type": "qwen3", "head_dim": 6, "attention_bias": True},
    *(GROUPED | {"model_type": family} for family in ("mistral", "phi", "phi3", "qwen2")),
    *(GROUPED | {"model_type": family, "head_dim": 2} for family in ("gemma", "gemma2", "gemma3_text")),
]


@pytest.mark.parametrize("config", [*BUILT, *OTHERS])
def test_models_are_those_that_transformers_builds(config):
    """Two blocks of those that are known by name, and small ones with other settings."""
    model = built(config)
    assert weights_of(config) == weights_of(model)
    assert estimate_memory(model, rank=16, device_gb=24) == estimate_memory(config, rank=16, device_gb=24)


def test_a_plain_module_counts_tied_weights_once_and_leaves_out_its_head():
    body = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False))
    assert list(quantised_layers(body)) == ["1"]
    assert weights_of(body) == {Weight((11, 6)): 2, Weight((6, 6), True): 1, Weight((6,)): 3}
    body[3].weight = body[0].weight
    assert estimate_memory(body)["parameters"] == 11 * 6 + 6 * 6 + 3 * 6
    assert list(quantised_layers(body)) == ["1"]
    assert list(quantised_layers(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))) == ["0", "1"]


def test_a_folder_and_a_file_are_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"num_key_value_heads": None, "rope_theta": 1e4}))
    expected = estimate_memory(TINY)
    assert estimate_memory(tmp_path) == estimate_memory(str(file)) == expected
    assert expected["parameters"] == 2 * 50 * 12 + 12 + 2 * (4 * 144 + 3 * 240 + 2 * 12)


# -- recommendations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_gb", "start"),
    [
        (200, "AdamW in float32 fits 200 GB: it takes 108 GB, 92.2 GB are left for activations"),
        (24, "AXIOM with hooks in 16 bits fits 24 GB: it takes 13.8 GB"),
        (12, "AXIOM with linear layers frozen in INT8 (the other 3.9% train) fits 12 GB: it takes 7.2"),
        (6, "Nothing fits 6 GB: at least 7.2"),
    ],
)
def test_what_fits_a_device(device_gb, start):
    said = estimate_memory("llama-7b", device_gb=device_gb)["recommendation"]
    assert said.startswith(start)
    assert "activations" in said
    assert said.endswith(".")


def test_without_a_device_every_way_is_named():
    said = estimate_memory("gpt2")["recommendation"]
    assert all(words in said for words in ("AdamW", "16 bits takes 0.331 GB", "INT8", "activations"))
    only_linear = estimate_memory(nn.Linear(3, 4, bias=False))["recommendation"]
    assert "INT8" not in only_linear  # nothing would train


# -- refusals ------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_not_downloaded_and_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing is downloaded.*meta-llama/Llama-2-7b-hf"):
        estimate_memory("meta-llama/Llama-3-7b")
    with pytest.raises(FileNotFoundError, match=r"known are google/gemma-3-1b-pt, google/gemma"):
        estimate_memory("google/gemma-3-4b-it")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        estimate_memory(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_attention_heads": 5}, "num_attention_heads=5.*head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*num_attention_heads=4"),
        ({"head_dim": -1}, "head_dim=-1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"model_type": "mistral"}, "no num_key_value_heads"),
        (TINY_GPT2 | {"add_cross_attention": True}, "add_cross_attention=True"),
        ({"model_type": "gemma2", "num_key_value_heads": 1}, "no head_dim"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm=True"),
    ],
)
def test_a_field_that_is_wrong_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        estimate_memory(TINY | change)


@pytest.mark.parametrize("content", [b"", b'{"model_type": "lla', b"\xff\xfe{}", b"[1]", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        estimate_memory(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("rank", rank) for rank in (-1, 1.5, True)), *(("device_gb", gb) for gb in (0, -8, math.nan))],
)
def test_a_senseless_rank_or_device_is_refused_and_what_is_no_model(name, value):
    with pytest.raises(ValueError, match=name):
        estimate_memory("gpt2", **{name: value})
    with pytest.raises(TypeError, match="not of int"):
        estimate_memory(7)
    with pytest.raises(ValueError, match="no parameters"):
        estimate_memory(nn.ReLU())


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_what_is_true_beside_what_is_promised(capsys):
    assert main(["estimate", "llama-7b", "--device-gb", "24"]) == 0
    said = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in said.splitlines()}
    assert "6,738,415,616 weights" in said
    assert rows["state"][-2:] == ["1,007", "280"]
    assert rows["gradients"][-4:] == ["103", "200,", "0.140", "GB"]
    assert rows["both"][-2:] == ["256", "220"]
    assert said.splitlines()[-1] == estimate_memory("llama-7b", device_gb=24)["recommendation"]


def test_the_command_promises_nothing_of_other_models_and_prints_the_table(capsys):
    assert main(["estimate", "gpt2", "--rank", "0"]) == 0
    said = capsys.readouterr().out
    assert "rank 0" in said
    assert "promised" not in said
    assert main(["table"]) == 0
    said = capsys.readouterr().out
    assert "4,750 / 1,007 / 305" in said
    assert "280 / 200 / 220" in said


def test_the_command_writes_json(capsys):
    assert main(["estimate", "gpt2-large", "--rank", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("claims") == CLAIMS["gpt2-large"]
    assert found == estimate_memory("gpt2-large", rank=16)
    assert main(["table", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"]["4"] == compression_table()[0]["state"][4]


@pytest.mark.parametrize(
    "given", [["nothing"], ["gpt2", "--rank", "-1"], ["gpt2", "--device-gb", "nan"], ["."]]
)
def test_an_error_of_the_command_is_one_sentence(given, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *given]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "model/config.json"),
            "model/config.json: No such",
        ),
        (OSError(28, "No space left on device"), "No space left on device\n"),
        (OSError("torn\n  apart"), "torn apart\n"),
        (ValueError(), "ValueError\n"),
    ],
)
def test_an_error_of_the_system_names_its_file(error, words, capsys, monkeypatch):
    def failing(*args, **named):
        raise error

    monkeypatch.setattr("ebc_lab.axiom.__main__.estimate_memory", failing)
    assert main(["estimate", "gpt2"]) == 2
    assert capsys.readouterr().err.startswith(words)
