"""The plain loop that the lab is compared with: the same GPT, eager, float32, torch's Adam at its defaults.

It is scripts/plain_loop.py, kept here because an installed package has no scripts, and knows nothing of the lab but the shape
of a run. `python -m ebc_lab.bench.plain_loop` is that loop behind a pipe: a process as a user would have it, with torch's own
number of threads and the allocator as it comes. No dropout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        y = self.attention_norm(x)
        q, k, v = (
            f(y).view(B, T, self.heads, C // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class PlainGPT(nn.Module):
    """Tokens (B, T) -> logits (B, T, V); parameters named as in `ebc_lab.workloads.gpt`, so that either takes the other's weights."""

    def __init__(self, vocabulary: int, blocks: int, width: int, heads: int, context: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(PlainBlock(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("o.weight", "mlp_out.weight"))
                nn.init.normal_(p, 0.0, 0.02 / (2 * blocks) ** 0.5 if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class PlainLoop:
    """Random windows of `data` (n,) through Adam. Weights and windows are drawn from torch's own generator, seeded here.

    Args:
        shape: `blocks`, `width`, `heads`, `context` of the model.
    """

    def __init__(
        self, data: Tensor, vocabulary: int, *, batch: int, lr: float, seed: int, device: str, **shape: int
    ):
        torch.manual_seed(seed)
        self.data, self.batch, self.context, self.device = data.cpu(), batch, shape["context"], device
        self.model = PlainGPT(vocabulary, **shape).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)

    @classmethod
    def of_run(cls, run: RunConfig, data: Tensor, vocabulary: int) -> PlainLoop:
        """The loop at a run's shape: its model, batch, learning rate, seed and device."""
        m = run.model
        return cls(
            data,
            vocabulary,
            batch=run.batch_size,
            lr=run.optimizer.lr,
            seed=run.seed,
            device=run.device,
            blocks=m.blocks,
            width=m.width,
            heads=m.heads,
            context=m.context,
        )

    def step(self) -> Tensor:
        """One step; -> its loss before the update, nats per token, not read."""
        starts = torch.randint(len(self.data) - self.context, (self.batch,)).tolist()
        inputs = torch.stack([self.data[i : i + self.context] for i in starts]).to(self.device)
        targets = torch.stack([self.data[i + 1 : i + 1 + self.context] for i in starts]).to(self.device)
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def steps(self, count: int) -> float:
        """Seconds for the next `count` steps."""
        start = time.perf_counter()
        for _ in range(count):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


class PlainProcess:
    """The loop at a run's shape in a process of its own, that steps when it is asked to. Raises UserError when it ends."""

    def __init__(self, run: RunConfig):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ebc_lab.bench.plain_loop"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.threads = int(self._ask(json.dumps(to_dict(run))))

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            assert self.process.stderr is not None
            said = self.process.stderr.read().strip().splitlines()
            self.process.wait()
            raise UserError(f"the plain loop's process ended: {said[-1] if said else 'it left no message'}")
        return answer

    def steps(self, count: int) -> float:
        """Seconds for the next `count` steps, by that process's clock."""
        return float(self._ask(str(count)))

    def __enter__(self) -> PlainProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # end of input: it leaves


def serve() -> None:
    """Read a run's settings, answer the number of threads; then for every count read, the seconds of so many steps."""
    from ebc_lab.workloads.corpus import locate

    run: RunConfig = from_dict(RunConfig, json.loads(sys.stdin.readline()))
    corpus = locate(run.data, quiet=True)
    loop = PlainLoop.of_run(run, torch.from_numpy(corpus.tokens()["train"]), len(corpus.vocabulary))
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        print(loop.steps(int(line)), flush=True)


if __name__ == "__main__":
    serve()
