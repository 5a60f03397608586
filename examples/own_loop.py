"""EBC in your own training loop: any torch model and optimizer, without the lab.

    python examples/own_loop.py --steps 200 --target-kl 0.01

Trains a small recurrent network on Python's own documentation, and prints the loss, the clip coefficient and
the KL that the step applied. `--target-kl inf` is the plain optimizer, bit for bit.
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ebc_lab.ebc import EllipsotopeClip


class CharRNN(nn.Module):
    def __init__(self, vocabulary: int, width: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.recurrent(self.embedding(tokens))[0])
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description="EBC around Adam in a plain loop.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--target-kl", type=float, default=0.01, help="nats per token; inf switches EBC off")
    options = parser.parse_args()

    text = "\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    index = {c: i for i, c in enumerate(characters)}
    data = torch.tensor([index[c] for c in text])

    torch.manual_seed(0)
    model = CharRNN(len(characters))
    optimizer = EllipsotopeClip(
        model,
        torch.optim.Adam(model.parameters(), lr=options.lr),
        target_kl=options.target_kl,
        audit_every=10,
    )
    for step in range(options.steps):
        starts = torch.randint(len(data) - 65, (16, 1))
        rows = data[starts + torch.arange(65)]
        logits = model(rows[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        stats = optimizer.step(rows[:, :-1], logits)
        optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps - 1:
            applied = "–" if stats.applied_kl is None else f"{stats.applied_kl:.4f}"
            print(f"step {step:4d}  loss {loss:.3f}  c {stats.clip_coefficient:.3f}  applied KL {applied}")


if __name__ == "__main__":
    main()
