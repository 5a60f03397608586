"""Models whose logits for a token depend on that token alone, and tokens for them."""

import torch
import torch.nn.functional as F
from torch import nn

from ebc_lab.ebc import attach


class Tokenwise(nn.Module):
    """Logits of a token depend on that token alone: (..., ) integers -> (..., V)."""

    def __init__(self, vocabulary=11, width=8, tied=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList([nn.Linear(width, width)])
            self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + torch.tanh(self.blocks[0](x)))


class Linear(nn.Module):
    """Inputs (rows, L, 4) -> logits (rows, V), one weight (4, V) in each of L blocks."""

    def __init__(self, weights):
        super().__init__()
        self.blocks = nn.ModuleList()
        for weight in weights:
            self.blocks.append(nn.Module())
            self.blocks[-1].weight = nn.Parameter(weight)

    def forward(self, x):
        return sum(x[:, i] @ block.weight for i, block in enumerate(self.blocks))


def integers(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def learn(model, optimizer, ids, *given, **named):
    """Take one step of the plainest loop, in which `ids` are the first input and the targets."""
    loss_of(model(ids, *given, **named), ids).backward()
    optimizer.step()
    model.zero_grad()


def attached_adam(model, lr=0.05, **options):
    """Return an Adam of what the model trains, and the EBC on it; without audits unless `options` ask."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    return optimizer, attach(model, optimizer, **{"target_kl": 0.002, "audit_every": 0, **options})
