"""The GPT that every run trains: pre-norm, learned positions, no biases, untied head.

* x + attention(norm(x)), then x + mlp(norm(x)); a last norm before the head
* q, k, v and o are separate matrices, so that each can be budgeted or projected separately
* weights ~ N(0, 0.02²), times model.init_scale, those that write into the residual stream divided by
  sqrt(2·blocks)
* q, k and v are applied as one matrix product; tokens of all sequences lie on one axis, except in attention
* hidden matrices are used through what a quantizer makes of them, each matrix by itself
* bfloat16 attention on a CPU is written out for short contexts and runs in float32 for long ones: the
  backward pass of torch's fused kernel is several times slower in bfloat16 than in float32

After Radford et al. 2019; norms before attention and mlp: Xiong et al., arXiv:2002.04745.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.verity import VerityGPT, ops

from . import Workload
from .losses import autocast, token_losses
from .partition import TextSplits

PLAIN_UP_TO = 128  # tokens


@functools.lru_cache(maxsize=8)
def _future(T: int) -> Tensor:
    """-inf above the diagonal, 0 elsewhere, (T, T) bfloat16 on the CPU."""
    return torch.full((T, T), -torch.inf, dtype=torch.bfloat16).triu_(1)


def attention(qkv: Tensor, B: int, heads: int, dropout: float, causal: bool = True) -> Tensor:
    """Attention: queries, keys and values of B·T tokens, (B·T, 3C) -> (B·T, C), same dtype."""
    N, width = qkv.shape
    T = N // B
    D = width // (3 * heads)
    return attend(qkv.view(B, T, 3, heads, D).permute(2, 0, 3, 1, 4), dropout, causal)


def attend(parted: Tensor, dropout: float = 0.0, causal: bool = True) -> Tensor:
    """The same of queries, keys and values by their heads, (3, B, heads, T, D) -> (B·T, heads·D)."""
    _, B, heads, T, D = parted.shape
    if parted.device.type != "cpu" or parted.dtype != torch.bfloat16:
        q, k, v = parted
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    elif dropout or T > PLAIN_UP_TO or not causal:
        with torch.autocast("cpu", enabled=False):
            q, k, v = parted.float()
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal).to(parted.dtype)
    else:
        q, k, v = parted.reshape(3, B * heads, T, D)
        with torch.autocast("cpu", enabled=False):
            scores = torch.baddbmm(_future(T).expand(B * heads, T, T), q, k.mT, alpha=D**-0.5)
            y = torch.bmm(scores.softmax(-1), v).view(B, heads, T, D)
    return y.transpose(1, 2).reshape(B * T, heads * D)


class HiddenLinear(nn.Linear):
    """x W^T with a hidden matrix W, or with what `quantize` makes of W, anew at every forward."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.quantize: Callable[[Tensor], Tensor] | None = None

    def effective(self) -> Tensor:
        """The matrix that the forward uses."""
        return self.weight if self.quantize is None else self.quantize(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective())


class Block(nn.Module):
    def __init__(self, config: ModelConfig, causal: bool = True):
        super().__init__()
        d = config.width
        self.causal = causal
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(d, bias=False)
        self.q = HiddenLinear(d, d)
        self.k = HiddenLinear(d, d)
        self.v = HiddenLinear(d, d)
        self.o = HiddenLinear(d, d)
        self.mlp_norm = nn.LayerNorm(d, bias=False)
        self.mlp_in = HiddenLinear(d, 4 * d)
        self.mlp_out = HiddenLinear(4 * d, d)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, B: int) -> Tensor:  # x: (B·T, C)
        dropout = self.dropout if self.training else 0.0
        weights = torch.cat([self.q.effective(), self.k.effective(), self.v.effective()])
        qkv = F.linear(self.attention_norm(x), weights)  # (B·T, 3C)
        x = x + self.drop(self.o(attention(qkv, B, self.heads, dropout, self.causal)))
        x = x + self.drop(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))
        return x

    def largest_logits(self, x: Tensor, B: int) -> Tensor:
        """The largest logit of attention in each head, of what the block is given; (heads,) float32.

        A second product of queries and keys: the fused attention does not tell.
        """
        weights = torch.cat([self.q.effective(), self.k.effective()])
        parted = F.linear(self.attention_norm(x), weights).view(B, len(x) // B, 2, self.heads, -1)
        q, k = parted.permute(2, 0, 3, 1, 4).float()  # (B, heads, T, D) each
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if self.causal:
            seen = torch.ones_like(logits[0, 0], dtype=torch.bool).tril_()
            logits = logits.masked_fill(~seen, -torch.inf)
        largest: Tensor = logits.amax((0, 2, 3))
        return largest


def draw_weights(module: nn.Module, blocks: int, scale: float = 1.0) -> None:
    """Initial matrices of so many blocks, and of whatever is around them in `module`, times `scale`."""
    for name, p in module.named_parameters():
        if p.ndim == 2:
            writes = name.endswith((".o.weight", ".mlp_out.weight"))
            nn.init.normal_(p, 0.0, scale * (0.02 / math.sqrt(2 * blocks) if writes else 0.02))


class GPT(nn.Module):
    """Tokens (B, T) of integers -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig, vocabulary: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        draw_weights(self, config.blocks, config.init_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        x = (self.token_embedding(tokens) + self.position_embedding.weight[:T]).view(B * T, -1)  # (B·T, C)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, B)
        logits: Tensor = self.head(self.norm(x))
        return logits.view(B, T, -1)


Model = TypeVar("Model", bound=nn.Module)


def drawn(make: Callable[[], Model], seed: int) -> Model:
    """The model that `make` makes, with its initial weights drawn from `seed` alone, on the CPU, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def build(config: ModelConfig, vocabulary: int, seed: int) -> GPT:
    """The GPT, so drawn."""
    return drawn(lambda: GPT(config, vocabulary), seed)


def build_exact(config: ModelConfig, vocabulary: int, seed: int) -> VerityGPT:
    """The same of exact layers; its weights are other ones than those that `build` draws from that seed."""
    generator = torch.Generator().manual_seed(seed)
    return VerityGPT(vocabulary, config.context, config.width, config.blocks, config.heads, generator)


def plain(
    vocabulary: int,
    context: int,
    width: int,
    blocks: int,
    heads: int,
    seed: int,
    quantize: Callable[[Tensor], Tensor] | None = None,
) -> GPT:
    """The model by its sizes, its hidden matrices used through `quantize`, for those without a RunConfig:
    what the entry point `gpt` of `ebc_lab.lowbit.text_model` names."""
    config = ModelConfig(blocks=blocks, width=width, heads=heads, context=context)
    model = build(config, vocabulary, seed)
    for layer in hidden(model):
        layer.quantize = quantize
    return model


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices inside the blocks of a model, in its order: of a GPT q, k, v, o, mlp-in and mlp-out."""
    return [p for p in model.get_submodule("blocks").parameters() if p.ndim == 2]


def hidden(model: nn.Module) -> list[HiddenLinear]:
    """Return the layers that hold the hidden matrices, in the model's order."""
    return [module for module in model.modules() if isinstance(module, HiddenLinear)]


def effective_weights(model: nn.Module) -> list[Tensor]:
    """Return what the forward uses of each trained parameter, in the model's order."""
    layers = {id(layer.weight): layer for layer in hidden(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [layers[id(p)].effective() if id(p) in layers else p for p in trained]


class GPTWorkload(TextSplits, Workload):
    """A GPT that predicts the next token of a text."""

    def build(self) -> nn.Module:
        return drawn(self.make, self.run.seed)

    def make(self) -> nn.Module:
        """The model with its weights drawn from torch's generator."""
        return GPT(self.run.model, self.vocabulary)

    def forward(self, called: nn.Module, inputs: Tensor) -> tuple[Tensor, None]:
        with autocast(self.run):
            logits: Tensor = called(inputs)
        return logits, None

    def loss(
        self, logits: Tensor, targets: Tensor, states: None, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = token_losses(logits, targets).mean()
        return loss, {"loss": loss.detach()}

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        return hidden_matrices(model)


class ExactGPTWorkload(GPTWorkload):
    """The same under determinism=verity: exact layers, and the parameters' names of the other."""

    def build(self) -> nn.Module:
        return build_exact(self.run.model, self.vocabulary, self.run.seed)

    def loss(
        self, logits: Tensor, targets: Tensor, states: None, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = ops.cross_entropy(logits, targets, reduction="mean")
        return loss, {"loss": loss.detach()}
