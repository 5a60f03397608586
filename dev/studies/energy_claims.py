"""What ebc-clip claims of its limit, measured on a small GPT-2: what a step costs, and the layers' budgets.

usage: python dev/studies/energy_claims.py [--pairs 20]    steps with the clip and without, in turn
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ebc_lab.ebc import energy_budget_clip

BLOCKS = 6
SHAPE = GPT2Config(
    vocab_size=256, n_positions=64, n_embd=128, n_layer=BLOCKS, n_head=4, bos_token_id=0, eos_token_id=0
)


def step(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, clipped: bool) -> float:
    """One step on 16×64 random tokens -> seconds."""
    tokens = torch.randint(256, (16, 64))
    clip = energy_budget_clip(model) if clipped else None
    began = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    if clip is not None:
        clip()
    optimizer.step()
    optimizer.zero_grad()
    took = time.perf_counter() - began
    if clip is not None:
        clip.remove()
    return took


def budgets(model: GPT2LMHeadModel) -> None:
    """Print 0.1 of the norm of each output, block by block."""
    tokens = torch.randint(256, (16, 64))
    for norm in ("rms", "raw"):
        clip = energy_budget_clip(model, norm=norm)
        model(input_ids=tokens, labels=tokens).loss.backward()
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            energies = [float(clip.record.energies[f"transformer.h.{b}.{part}"]) for b in range(BLOCKS)]
            print(f"budget, {norm}, {part:11}", " ".join(f"{0.1 * e:6.3f}" for e in energies))
        model.zero_grad()
        clip.remove()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(SHAPE).train()
    print("at initialisation")
    budgets(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, clipped=True)
    for _ in range(3):
        ratios = []
        for i in range(pairs):
            took = {
                clipped: step(model, optimizer, clipped)
                for clipped in ((True, False) if i % 2 else (False, True))
            }
            ratios.append(took[True] / took[False])
        low, *_, high = statistics.quantiles(ratios, n=10)
        print(
            f"a step with the clip: ×{statistics.median(ratios):.2f}, single pairs ×{low:.2f} to ×{high:.2f}"
        )
    print("after these steps")
    budgets(model)


if __name__ == "__main__":
    main()
