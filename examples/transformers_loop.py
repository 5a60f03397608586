"""EBC around a Hugging Face `transformers` model, built from a configuration: nothing is downloaded.

    python examples/transformers_loop.py --steps 100 --target-kl 0.005
    python examples/transformers_loop.py --model llama --budget fisher

Trains a small causal language model on the bytes of sentences of Python's own documentation, padded to the
longest of a batch, and prints the loss, the clip coefficient, and the applied KL over its target. `step`
takes the batch as the model does, the model's output, and the mask of what is text; tied weights and dropout
need no extra code.
"""

import argparse
import statistics
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from ebc_lab.ebc import EllipsotopeClip
from ebc_lab.ebc.options import BUDGETS

PAD = 256  # after the 256 bytes
VOCABULARY = 257
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=PAD, eos_token_id=PAD
)
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    max_position_embeddings=128,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    bos_token_id=PAD,
    eos_token_id=PAD,
)


def sentences(longest: int = 96) -> list[torch.Tensor]:
    """Lines of the text as byte tokens, none shorter than 8."""
    lines = [line.strip().encode()[:longest] for name in sorted(topics) for line in topics[name].splitlines()]
    return [torch.tensor(list(line)) for line in lines if len(line) >= 8]


def batch_of(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a tokenizer and a collator return: ids, attention mask and labels, each (B, T)."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = ids != PAD
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="EBC around Adam, training a transformers model from scratch."
    )
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--target-kl", type=float, default=0.005, help="nats per token; inf switches EBC off")
    parser.add_argument("--budget", choices=BUDGETS, default="shadow")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({"gpt2": GPT2, "llama": LLAMA}[options.model]).train()
    optimizer = EllipsotopeClip(
        model,
        torch.optim.Adam(model.parameters(), lr=options.lr),
        target_kl=options.target_kl,
        budget=options.budget,
        probe_sequences=8,
    )
    text = sentences()
    clipped: list[float] = []
    for step in range(options.steps):
        batch = batch_of([text[i] for i in torch.randint(len(text), (32,)).tolist()])
        output = model(**batch)
        output.loss.backward()
        stats = optimizer.step(batch, output, batch["attention_mask"])
        optimizer.zero_grad()
        kl = ""
        if stats.applied_kl is not None:  # at every twentieth step
            ratio = float(stats.applied_kl) / options.target_kl
            clipped += [ratio] if stats.clip_coefficient < 0.999 else []
            kl = f"  applied KL / target {ratio:.2f}"
        if step % 10 == 0:
            print(f"step {step:4d}  loss {output.loss.item():.3f}  c {stats.clip_coefficient:.3f}{kl}")
    if clipped:
        median = statistics.median(clipped)
        print(f"median over {len(clipped)} audited, clipped steps: applied KL / target {median:.2f}")


if __name__ == "__main__":
    main()
