"""Hugging Face models from tiny configurations, in loops of their users' own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import IGNORED, V, log_softmax, padding, text
from .loop import Loop
from .parts import seeded

PAD = V  # behind the text's own symbols
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def adamw(model: nn.Module, lr: float = 1e-2) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=lr)]


def named_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    """What a collator returns goes to the model by name, labels too, and the loss is the model's."""
    (optimizer,) = optimizers
    loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def named_log_p(model: nn.Module, batch: Any) -> Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    return log_softmax(model(**given).logits)[batch["attention_mask"].flatten().bool()]


# -- decoders ------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=V + 1, **SIZES, num_key_value_heads=2, max_position_embeddings=64
    )
    model = transformers.LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    return model


def mixtral() -> nn.Module:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=V + 1,
        **SIZES,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        router_jitter_noise=0.1,
    )
    return transformers.MixtralForCausalLM(config)


def padded(
    number: int, rows: int = 24, length: int = 32, shortest: int = 8, left: bool = False
) -> dict[str, Tensor]:
    """Rows padded on the right, or on the left as for generation."""
    ids = text(number, rows, length)
    mask = padding(number, rows, length, longest=length, shortest=shortest)
    mask = mask.flip(1) if left else mask
    return {
        "input_ids": ids.masked_fill(~mask, PAD),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, IGNORED),
    }


LLAMA = Loop(
    name="Llama",
    like="short sentences padded on the left, gradient checkpointing",
    build=partial(seeded, llama),
    optimizers=adamw,
    batch=partial(padded, rows=96, length=8, shortest=2, left=True),
    step=named_step,
    log_p=named_log_p,
    target_kl=0.0005,
)

MIXTRAL = Loop(
    name="Mixtral",
    like="mixture of experts with jitter noise in training, the router's loss is in the model's",
    build=partial(seeded, mixtral),
    optimizers=adamw,
    batch=padded,
    step=named_step,
    log_p=named_log_p,
    target_kl=0.0005,
)

# -- an encoder and a decoder --------------------------------------------------------------------------------


def t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=V + 1,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    return transformers.T5ForConditionalGeneration(config)


def questions(number: int, rows: int = 24) -> dict[str, Tensor]:
    ids = text(number, rows, 16)
    mask = padding(number, rows, 16, longest=16, shortest=4)
    return {
        "input_ids": ids.masked_fill(~mask, PAD),
        "attention_mask": mask.long(),
        "labels": (text(number, rows, 12) + 1) % V,
    }


T5 = Loop(
    name="T5",
    like="encoder and decoder, whose input is made of the labels",
    build=partial(seeded, t5),
    optimizers=partial(adamw, lr=3e-3),
    batch=questions,
    step=named_step,
    log_p=lambda model, batch: log_softmax(model(**batch).logits),
    target_kl=0.0005,
)

LOOPS = [LLAMA, MIXTRAL, T5]
