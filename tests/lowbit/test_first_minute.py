"""What users of the "1.58-bit hybrid" trainer type first: it works, or an error says what to write here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ebc_lab import lowbit
from ebc_lab.ebc import attach
from ebc_lab.lowbit import (
    BackendConfig,
    HybridDispatcher,
    HybridLLMTrainer,
    PackedLinear,
    PerformanceBenchmark,
    TrainingConfig,
    hidden_linears,
    load_packed,
    quantize,
    quantize_model,
    save_packed,
)
from ebc_lab.lowbit.names import INSTEAD

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lowbit.md").read_text(encoding="utf-8")


def of_page(heading: str) -> str:
    """The section of the page."""
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def run(heading: str) -> dict[str, Any]:
    """The names that the section's snippet leaves."""
    left: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", of_page(heading), re.DOTALL)[1], left)
    return left


# -- the familiar names --------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_snippet_of_the_page():
    left = run("The familiar names")
    assert left["summary"]["total_steps"] == 5 * 29
    assert left["summary"]["final_loss"] < 0.6 * left["summary"]["zero_predictor_loss"]
    assert left["dispatcher"].config.prefer_gpu is False
    assert left["dispatcher"].get_metrics()["total_operations"] == 2


def test_an_import_of_a_name_that_is_another_here_says_it():
    for name, instead in INSTEAD.items():
        with pytest.raises(ImportError) as refused:
            exec(f"from ebc_lab.lowbit import {name}")
        assert instead in str(refused.value)
    assert not INSTEAD.keys() & set(lowbit.__all__)
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    old = np.clip(np.rint(2 * values) / 2, -1, 1)  # as the page says of the old quantizer
    assert np.array_equal(quantize(values, "five", scale=0.5).values(), old)
    with pytest.raises(ImportError, match="cannot import name 'Quantiser'"):
        exec("from ebc_lab.lowbit import Quantiser")


def test_settings_take_the_other_spellings_given_or_assigned():
    config = TrainingConfig(
        use_quantization=False, data_clusters=8, base_learning_rate=0.01, use_clustering=True
    )
    assert (config.quantize_weights, config.quantize_gradients) == (False, False)
    assert (config.n_clusters, config.learning_rate) == (8, 0.01)
    config.data_clusters = 3
    assert config.n_clusters == 3
    assert TrainingConfig(use_clustering=False).n_clusters == 1
    with pytest.raises(TypeError, match="sets n_clusters, which is given too"):
        TrainingConfig(data_clusters=8, n_clusters=8)
    with pytest.raises(
        TypeError, match=r"'parameter_clusters' \(leave it out.*'use_trust_region' \(use_adaptive_lr"
    ):
        TrainingConfig(parameter_clusters=4, use_trust_region=True)
    with pytest.raises(TypeError, match=r"no setting 'prefer_gup' .did you mean 'prefer_gpu'"):
        BackendConfig().prefer_gup = True
    with pytest.raises(TypeError, match=r"TrainingConfig has no setting 'epochs' .did you mean 'max_epochs'"):
        TrainingConfig(epochs=5)
    slow = BackendConfig()
    slow.threads = 0
    with pytest.raises(ValueError, match="threads must be at least 1"):
        HybridDispatcher(slow)


def test_max_steps_alone_is_how_many_steps_are_taken():
    rows = np.random.default_rng(0).normal(size=(40, 4))
    trainer = HybridLLMTrainer(
        model_dim=8, num_layers=2, config=TrainingConfig(max_steps=50, data_clusters=4)
    )
    summary = trainer.train(rows, rows[:, :2])
    assert summary["total_steps"] == 50  # 25 epochs
    for ask, instead in (
        (lambda: summary.loss, "final_loss"),
        (lambda: summary["loss_reduction_rate"], "total_loss_reduction"),
        (lambda: summary["optimizer_summary"]["constraint_activation_rate"], "constraints_active_share"),
        (lambda: trainer.parameters, "quantized_weights"),
        (lambda: HybridDispatcher().select_quantizer(9), "get_metrics"),
        (lambda: PerformanceBenchmark({"quantization_sizes": [9]}), "(sizes)"),
    ):
        with pytest.raises((AttributeError, KeyError, TypeError), match=re.escape(instead)):
            ask()


def test_a_function_for_numpy_is_told_what_it_gets():
    rows = np.random.default_rng(0).normal(size=(40, 4))
    trainer = HybridLLMTrainer(TrainingConfig(max_steps=1, n_clusters=4))
    with pytest.raises(TypeError) as refused:
        trainer.train(rows, loss_fn=lambda y_pred, y_true: np.mean((y_pred - y_true) ** 2))
    assert "torch tensors" in refused.value.__notes__[0]
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - numpy's own words
        trainer.train(rows, eval_fn=lambda parameters: rows @ parameters)
    assert "model(inputs)" in refused.value.__notes__[0]


def test_a_call_can_time_the_backends_anew(capsys: pytest.CaptureFixture[str]):
    dispatcher = HybridDispatcher(BackendConfig(prefer_gpu=False, verbose=True))
    values = np.ones((10, 2), np.float32)
    for benchmark in (False, False, True):
        dispatcher.quantize(values, benchmark=benchmark)
        dispatcher.kmeans(values, 2, benchmark=benchmark)
    always = HybridDispatcher(BackendConfig(prefer_gpu=False, verbose=True, benchmark_mode=True))
    for _ in range(2):
        always.quantize(values)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["quantize", "kmeans"] * 2 + ["quantize"] * 2


# -- a model of your own -------------------------------------------------------------------------------------


def llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two blocks, in evaluation mode, the same for the same changes."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **changes))
    return model.eval()


TOKENS = torch.arange(24).view(2, 12)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_the_llama_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    left = run("A model of your own")
    trainer, model = left["trainer"], left["model"]
    summary = trainer.get_training_summary()
    assert summary["final_loss"] < 0.8 * summary["initial_loss"]
    assert torch.equal(logits(model), logits(trainer.model.eval()))
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == len(trainer.quantized_weights()) == 2 * 7
    assert Path("llama.ebcpack").stat().st_size < summary["compression"]["model_bytes_float32"] / 2


def test_a_training_of_a_model_goes_on_from_its_checkpoint(tmp_path: Path):
    tokens = np.tile(np.arange(30), 40)
    settings = {"levels": "ternary", "batch_size": 2, "n_clusters": 1, "use_adaptive_lr": False}
    config = TrainingConfig(**settings, max_steps=4)
    whole = HybridLLMTrainer(config, model=llama())
    whole.train(tokens)
    half = HybridLLMTrainer(TrainingConfig(**settings, max_steps=2), model=llama())
    half.train(tokens)
    half.save_checkpoint(tmp_path / "half")
    other = HybridLLMTrainer(config, model=llama())
    other.load_checkpoint(tmp_path / "half")
    other.train(tokens)
    assert torch.equal(logits(other.model.eval()), logits(whole.model.eval()))
    with pytest.raises(ValueError, match="has the token 40, but the model knows 32"):
        whole.train(tokens + 11)
    with pytest.raises(ValueError, match="num_layers is 2, but a model is given"):
        HybridLLMTrainer(config, num_layers=2, model=llama())


@pytest.mark.filterwarnings("ignore:c is chosen by 12 tokens")
@pytest.mark.parametrize("levels", ["ternary", "five"])
def test_a_quantized_llama_trains_under_a_kl_budget(levels: str):
    model = quantize_model(llama(), levels, group="row")
    names = list(llama().state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ebc = attach(model, optimizer, target_kl=1e-3, budget="shadow")
    before, latent = logits(model), model.model.layers[0].mlp.up_proj.weight.clone()
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, latent)
    assert list(model.state_dict()) == names
    assert 0 < ebc.last.clip_coefficient < 1


def test_which_layers_are_hidden():
    everything = [name for name, m in llama().named_modules() if isinstance(m, nn.Linear)]
    assert list(hidden_linears(llama())) == everything[:-1]  # lm_head
    assert list(hidden_linears(llama(), keep=[])) == everything
    perceptron = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    assert list(hidden_linears(perceptron)) == ["0"]
    quantize_model(perceptron, keep=["0"])
    assert list(hidden_linears(perceptron)) == ["2"]
    with pytest.raises(ValueError, match=r"no linear layer 'lm_haed' .did you mean 'lm_head'"):
        quantize_model(llama(), keep=["lm_haed"])
    with pytest.raises(ValueError, match=r"no nn\.Linear to quantize"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="levels"):
        quantize_model(llama(), "seven")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_shared_is_written_once_and_shared_again(precision: torch.dtype, tmp_path: Path):
    def built() -> LlamaForCausalLM:
        model = llama(tie_word_embeddings=True, attention_bias=True).to(precision)
        model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj  # one module
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    model = quantize_model(built(), "five", group=8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    save_packed(tmp_path / "model", model)
    assert len(lowbit.read_packed(tmp_path / "model")) == len(list(model.parameters()))
    loaded = load_packed(tmp_path / "model", built())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.model.layers[1].mlp.down_proj is loaded.model.layers[0].mlp.down_proj


def test_a_file_of_another_model_changes_nothing(tmp_path: Path):
    file = tmp_path / "model"
    with pytest.raises(ValueError, match="call quantize_model"):
        save_packed(file, llama())
    save_packed(file, quantize_model(llama()))
    for model, reason in (
        (llama(num_key_value_heads=1), "k_proj.weight has the shape .16, 16., this one's .8, 16."),
        (llama(attention_bias=True), "k_proj.bias is in one of the two only"),
        (llama().to("meta"), "on meta"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"holds another model: .*{reason}"):
            load_packed(file, model)
        for name, tensor in model.state_dict().items():
            assert tensor.is_meta or torch.equal(tensor, before[name])


def test_what_was_loaded_packed_is_not_trained_on_in_silence(tmp_path: Path):
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    save_packed(tmp_path / "saved", quantize_model(made(), keep="1"))
    loaded = load_packed(tmp_path / "saved", made())
    for again in (lambda: quantize_model(loaded), lambda: save_packed(tmp_path / "again", loaded)):
        with pytest.raises(ValueError, match="filled by load_packed, whose codes cannot be trained"):
            again()


def test_a_layer_says_its_levels_and_group():
    model = quantize_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), levels="five", group="row")
    assert repr(model[0]) == (
        "QuantizedLinear(in_features=4, out_features=3, bias=True, levels=five, group=row)"
    )
