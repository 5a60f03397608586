"""Hugging Face models from tiny configurations, in loops of their users' own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import CLASSES, IGNORED, V, drawn, images, log_softmax, padding, text
from .loop import Loop
from .parts import seeded

PAD = V  # behind the text's own symbols
MASKED = V + 1
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
    log_p = log_softmax(model(**given).logits)
    return log_p[batch["attention_mask"].flatten().bool()] if "attention_mask" in batch else log_p


# -- BERT ----------------------------------------------------------------------------------------------------


def bert(kind: str) -> nn.Module:
    import transformers  # takes seconds, and most loops do without

    config = transformers.BertConfig(
        vocab_size=V + 2, **SIZES, max_position_embeddings=64, pad_token_id=PAD, num_labels=CLASSES
    )
    return getattr(transformers, kind)(config)


def tagged(number: int, rows: int = 32, length: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and tags, (rows, length) each; most of it is padding."""
    ids = text(number, rows, length)
    mask = padding(number, rows, length, longest=16)
    return ids.masked_fill(~mask, PAD), mask.long(), (ids % CLASSES).masked_fill(~mask, IGNORED)


def tagging_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    ids, mask, tags = batch
    (optimizer,) = optimizers
    logits = model(ids, mask).logits
    loss = F.cross_entropy(logits.view(-1, CLASSES), tags.view(-1), ignore_index=IGNORED)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def tagged_log_p(model: nn.Module, batch: Any) -> Tensor:
    ids, mask, _ = batch
    return log_softmax(model(ids, mask).logits)[mask.flatten().bool()]


BERT_TAGS = Loop(
    name="BERT tagger",
    like="the attention mask is given by its place, and most positions are padding",
    build=partial(seeded, bert, "BertForTokenClassification"),
    optimizers=adamw,
    batch=tagged,
    step=tagging_step,
    log_p=tagged_log_p,
    target_kl=0.0001,
)


def hidden_words(number: int, rows: int = 24, length: int = 32) -> dict[str, Tensor]:
    ids = text(number, rows, length)
    mask = padding(number, rows, length, longest=length, shortest=8)
    hidden = mask & (torch.rand(rows, length, generator=drawn(number + 2)) < 0.15)
    return {
        "input_ids": ids.masked_fill(hidden, MASKED).masked_fill(~mask, PAD),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~hidden, IGNORED),
    }


BERT_WORDS = Loop(
    name="BERT",
    like="masked words: one position in seven has a label, and all have predictions",
    build=partial(seeded, bert, "BertForMaskedLM"),
    optimizers=partial(adamw, lr=3e-3),
    batch=hidden_words,
    step=named_step,
    log_p=named_log_p,
    target_kl=0.0005,
)

# -- decoders ------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=V + 1, **SIZES, num_key_value_heads=2, max_position_embeddings=64
    )
    model = transformers.LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    return model


def qwen() -> nn.Module:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=V + 1, **SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    )
    return transformers.Qwen3ForCausalLM(config)


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


def left_padded(number: int, rows: int = 96, length: int = 8) -> dict[str, Tensor]:
    """Short sentences, padded on the left as for generation."""
    ids = text(number, rows, length)
    mask = padding(number, rows, length, longest=length, shortest=2).flip(1)
    return {
        "input_ids": ids.masked_fill(~mask, PAD),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, IGNORED),
    }


def right_padded(number: int, rows: int = 24, length: int = 32) -> dict[str, Tensor]:
    ids = text(number, rows, length)
    mask = padding(number, rows, length, longest=length, shortest=8)
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
    batch=left_padded,
    step=named_step,
    log_p=named_log_p,
    target_kl=0.0005,
)

QWEN = Loop(
    name="Qwen3",
    like="tied weights, padded on the right",
    build=partial(seeded, qwen),
    optimizers=adamw,
    batch=right_padded,
    step=named_step,
    log_p=named_log_p,
    target_kl=0.0005,
)

MIXTRAL = Loop(
    name="Mixtral",
    like="mixture of experts with jitter noise in training, the router's loss is in the model's",
    build=partial(seeded, mixtral),
    optimizers=adamw,
    batch=right_padded,
    step=named_step,
    log_p=named_log_p,
    target_kl=0.0005,
)

# -- others --------------------------------------------------------------------------------------------------


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


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        **(SIZES | {"hidden_size": 32, "intermediate_size": 64}),
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def pixels(number: int) -> dict[str, Tensor]:
    x, labels = images(number)
    return {"pixel_values": x, "labels": labels}


VIT = Loop(
    name="ViT",
    like="pixel values by name, one prediction for each row",
    build=partial(seeded, vit),
    optimizers=adamw,
    batch=pixels,
    step=named_step,
    log_p=named_log_p,
    target_kl=0.0005,
)

LOOPS = [BERT_TAGS, BERT_WORDS, LLAMA, QWEN, MIXTRAL, T5, VIT]
