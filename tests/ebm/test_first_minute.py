"""What an author of the original program types first: it works here, or one sentence says what to type."""

import shlex

import pytest
import torch
from support.called import refused
from support.ebm_models import energy_model, some_tokens

import ebc_lab.ebm
from ebc_lab.config.errors import UserError
from ebc_lab.config.overrides import check_overrides
from ebc_lab.ebm import Sampling, draw, written

REWRITTEN = {  # as the original's scripts are called -> what is typed here
    "diagnose --checkpoint 'my run/model.pt' --device cpu": "diagnose 'my run/model.pt'",
    "generate --checkpoint run --prompt 'a b' --max_tokens 20": "generate run --prompt 'a b' --tokens 20",
    "generate run --prompt x --max-tokens=9 --top_k 5": "generate run --prompt x --tokens 9 --top-k 5",
    "evaluate --checkpoint run --n_samples 160 --n_steps 50": "evaluate run --samples 160",
    "train --device vulkan --epochs 12 --batch-size 32": "train device=auto tokens=12e6 batch_size=32",
    "train train.py --epochs 3 --batch_size 16": "train tokens=3e6 batch_size=16",
    "train --checkpoint-dir 'my run' --validate": "train 'hydra.run.dir=my run'",
    "train --resume nowhere": "train from=nowhere/spec.json hydra.run.dir=nowhere",
    "train --resume 'my run/model.pt'": "train 'from=my run/spec.json' 'hydra.run.dir=my run'",
}


@pytest.mark.parametrize("typed", REWRITTEN)
def test_a_command_line_of_the_original_is_answered_with_the_one_to_type(typed, tmp_path):
    said = refused("ebm", *shlex.split(typed), cwd=tmp_path)
    assert f"type `ebc-lab ebm {REWRITTEN[typed]}`" in said
    command, *words = shlex.split(REWRITTEN[typed])
    if command == "train":
        check_overrides(words, hydra_keys=True)
    assert ("Vulkan" in said) == ("vulkan" in typed)


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        ("latent_dim", "ebm.n"),
        ("max_splats", "ebm.splats"),
        ("knn_k", "ebm.neighbours"),
        ("noise_levels", "ebm.levels"),
        ("moe_experts", "decoder.experts"),
        ("langevin_dt", "sampler.step"),
    ],
)
def test_a_field_of_the_original_s_configuration_is_answered_with_the_setting(field, setting):
    with pytest.raises(UserError, match=f"did you mean {setting}"):
        check_overrides([f"{field}=1"])


USES = {
    "logits": lambda m, t, s, c: m(t),
    "energy": lambda m, t, s, c: m.energy(s, c),
    "score": lambda m, t, s, c: m.under(c).score(s),
    "settled": lambda m, t, s, c: m.settle(s, c),
    "likelihood": lambda m, t, s, c: m.splat_energy(s),
    "sample": lambda m, t, s, c: draw(m, s, c, Sampling(), torch.Generator()),
    "text": lambda m, t, s, c: list(written(m, [1], 2, context=8)),
    "statistics": lambda m, t, s, c: m.store.observe(s),
    "nearest": lambda m, t, s, c: m.store.nearest(s, 1),
}


@pytest.mark.parametrize("adapt", ["statistics", "gradient"])
@pytest.mark.parametrize("use", USES)
def test_a_store_without_splats_says_what_to_call_first(use, adapt):
    model, tokens = energy_model(in_use=0, adapt=adapt), some_tokens()
    with pytest.raises(
        ValueError, match=r"no splats yet: first call `model\.store\.grow\(states, count, rng\)`"
    ):
        USES[use](model, tokens, *model.encode(tokens))


def test_a_name_of_the_original_is_answered_with_one_that_is_here():
    with pytest.raises(ImportError, match=r"EBMModel .* EnergyModel\(ModelSettings"):
        from ebc_lab.ebm import EBMModel  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ebc_lab.ebm.nothing
    for name in ebc_lab.ebm.__all__:
        assert getattr(ebc_lab.ebm, name).__name__ == name
        assert name in dir(ebc_lab.ebm)
