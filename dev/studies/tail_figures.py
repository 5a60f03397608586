"""How far single steps miss their KL budget on text that no batch holds: GPT-2 and Llama from configs.

    python dev/studies/tail_figures.py
    python dev/studies/tail_figures.py --steps 100 --models gpt2 --contexts 64

Trains each with Adam and `attach`, at a learning rate of which EBC clips most steps, on the characters of the
lab's text: once where only the first 20 steps measure more than one KL (`refine_steps=20`), once where every
step measures again while c and the trial c differ by more than a factor of 1.5 (the default). Measures the KL
of every step on windows of the test split, and on the very rows that chose c, both without dropout.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from ebc_lab.config.parts.data import DataConfig
from ebc_lab.ebc import attach
from ebc_lab.ebc.logits import mean_kl
from ebc_lab.workloads.corpus import locate

HELD_ROWS = 64
BAND = (0.7, 1.3)


def configured(name: str, vocabulary: int, context: int) -> PretrainedConfig:
    if name == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=context,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def windows(text: np.ndarray, rows: int, context: int, generator: np.random.Generator) -> Tensor:
    """Random windows, (rows, context) int64."""
    starts = generator.integers(len(text) - context, size=rows)
    return torch.from_numpy(text[starts[:, None] + np.arange(context)])


@torch.no_grad()
def logits_on(model: nn.Module, rows: Tensor) -> Tensor:
    """Without dropout."""
    model.eval()
    z: Tensor = model(input_ids=rows).logits
    model.train()
    return z


def figures(
    name: str,
    context: int,
    refine_steps: int | None,
    texts: Mapping[str, np.ndarray],
    options: argparse.Namespace,
) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    vocabulary = 1 + int(max(text.max() for text in texts.values()))
    model = AutoModelForCausalLM.from_config(configured(name, vocabulary, context)).train()
    adam = torch.optim.Adam(model.parameters(), lr=options.lr)
    ebc = attach(
        model,
        adam,
        target_kl=options.target_kl,
        refine_steps=refine_steps,
        probe_sequences=options.probe_sequences,
        audit_every=0,
    )
    held = windows(texts["test"], HELD_ROWS, context, generator)
    before = logits_on(model, held)
    ratios: list[float] = []
    on_probe: list[float] = []
    measurements: list[int] = []
    for _ in range(options.steps):
        rows = windows(texts["train"], options.rows, context, generator)
        probe = rows[: options.probe_sequences]
        probe_before = logits_on(model, probe)
        model(input_ids=rows, labels=rows).loss.backward()
        adam.step()
        adam.zero_grad()
        after = logits_on(model, held)
        stats = ebc.last
        assert stats is not None
        assert stats.measurements is not None
        measurements.append(int(stats.measurements))
        if stats.clip_coefficient < 0.999:
            ratios.append(float(mean_kl(before, after)) / options.target_kl)
            on_probe.append(float(mean_kl(probe_before, logits_on(model, probe))) / options.target_kl)
        before = after
    within = statistics.mean(BAND[0] <= ratio <= BAND[1] for ratio in ratios) if ratios else math.nan
    values = [
        name,
        f"{context}",
        "any step" if refine_steps is None else f"first {refine_steps}",
        f"{len(ratios) / options.steps:.0%}",
        f"{within:.0%}",
        f"{statistics.median(ratios):.2f}",
        f"{max(ratios):.1f}",
        f"{max(on_probe):.1f}",
        f"{statistics.mean(measurements):.2f}",
    ]
    return f"| {' | '.join(values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Misses of the KL budget, with and without measuring again.")
    parser.add_argument("--models", nargs="+", choices=("gpt2", "llama"), default=["gpt2", "llama"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--target-kl", type=float, default=0.005, help="nats per token")
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--probe-sequences", type=int, default=8)
    options = parser.parse_args()
    corpus = locate(DataConfig())
    judges = f"{HELD_ROWS} rows of the test split judge it"
    print(f"{corpus.title}, {options.steps} steps of Adam at {options.lr:g}, target {options.target_kl:g}, ")
    print(f"{options.probe_sequences} of {options.rows} rows choose c, {judges}\n")
    titles = [
        "model",
        "T",
        "measures again",
        "clipped",
        "within ±30%",
        "median",
        "worst",
        "worst on its own rows",
    ]
    print(f"| {' | '.join([*titles, 'KLs a step'])} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models:
        for context in options.contexts:
            for refine_steps in (20, None):
                print(figures(name, context, refine_steps, corpus.tokens(), options), flush=True)


if __name__ == "__main__":
    main()
