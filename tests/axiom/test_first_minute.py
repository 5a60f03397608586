"""What an author of the published package types first (docs/axiom.md, "The familiar names")."""

import pytest
import torch
from torch import nn

from ebc_lab.axiom import AXIOM, Axiom, AXIOM_Trainer, estimate_memory, load_model

IDS = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    )


# -- hooks after plain steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zeroed", ["after", "never"])
def test_hooks_may_follow_plain_steps_whenever_gradients_are_zeroed(zeroed):
    ends = []
    for when in ("before", zeroed):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        opt = AXIOM(model.parameters(), lr=0.1, rank=2)
        for _ in range(2):
            opt.zero_grad(set_to_none=when == "before")
            model(torch.eye(6)).square().sum().backward()
            opt.step()
        if when == "before":
            opt.zero_grad()
        opt.register_hooks(lr_scale=25.0)
        if when == "after":
            opt.zero_grad(set_to_none=False)
        model(torch.eye(6)).square().sum().backward()
        opt.step()
        assert all(p.grad is None for p in model.parameters())
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


class WithoutGradient(torch.autograd.Function):
    """x, which w has no part in."""

    @staticmethod
    def forward(ctx, x, w):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_a_hook_that_is_called_without_a_gradient_moves_nothing():
    x, w = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = AXIOM([x, w])
    opt.register_hooks()
    WithoutGradient.apply(x, w).sum().backward()
    opt.step()
    assert torch.equal(w, torch.ones(3))
    assert not torch.equal(x, torch.ones(3))


# -- names of other versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"betas": (0.9, 0.999)}, "betas: type beta1=0.9"),
        ({"eps": 1e-8}, "eps: leave it out"),
        ({"total_steps": 10_000}, "total_steps: .*OneCycleLR"),
        ({"warmup_ratio": 0.1}, "warmup_ratio: .*OneCycleLR"),
        ({"weight_deacy": 0.1}, "weight_deacy: choose among lr, weight_decay"),
    ],
)
def test_settings_of_other_versions_say_what_to_type(setting, words):
    with pytest.raises(TypeError, match=f"AXIOM has no setting {words}"):
        Axiom(nn.Linear(2, 2).parameters(), lr=5e-4, **setting)


# -- the trainer ---------------------------------------------------------------------------------------------


def trained(model, batch, **settings):
    with AXIOM_Trainer(
        model, [batch], [batch], lr=0.01, log_interval=0, save_results=False, **settings
    ) as trainer:
        return trainer.fit(steps=3)


def test_without_labels_a_batch_is_its_own_label_and_padding_is_left_out(transformers):
    mask = (torch.arange(16) < 10).expand(4, 16).long()
    labels = IDS.masked_fill(mask == 0, -100)
    plain = trained(gpt2(transformers), {"input_ids": IDS, "labels": IDS})
    for batch in ({"input_ids": IDS}, IDS, [IDS], {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}):
        assert trained(gpt2(transformers), batch)["train_losses"] == plain["train_losses"]
    padded = trained(gpt2(transformers), {"input_ids": IDS, "attention_mask": mask})
    named = trained(gpt2(transformers), {"input_ids": IDS, "attention_mask": mask, "labels": labels})
    for curve in ("train_losses", "val_losses"):
        assert padded[curve] == named[curve] != plain[curve]
    assert f"{padded['peak_vram_gb']:.2f} GB" == "0.00 GB" or torch.cuda.is_available()


def test_adapters_on_a_model_in_8_bits_train(transformers, tmp_path):
    pytest.importorskip("torchao")
    peft = pytest.importorskip("peft")
    gpt2(transformers).save_pretrained(tmp_path)
    model = peft.get_peft_model(load_model(tmp_path, bits=8), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    losses = trained(model, {"input_ids": IDS}, warmup_steps=0)["train_losses"]
    assert losses[-1] < losses[0]


def test_a_gradient_that_comes_back_after_its_hook_says_why():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = AXIOM(model.named_parameters(), lr=1e-2)
    optimizer.register_hooks()
    model(torch.ones(3, 4)).sum().backward()
    model[1].weight.grad = torch.ones(2, 4)  # as DistributedDataParallel does, from its bucket
    with pytest.raises(RuntimeError, match=r"1\.weight moved in backward and got its gradient back"):
        optimizer.step()


def test_a_configuration_of_transformers_is_taken_as_it_is(transformers):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    assert estimate_memory(config) == estimate_memory(config.to_dict())
