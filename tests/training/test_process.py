"""How a process is set up to train: what is compiled, and which numbers are computed with."""

import shutil
from dataclasses import replace

import pytest
import torch
from support.runs import ebc

from ebc_lab.components import optimizer as optimizers
from ebc_lab.components import stabilizers
from ebc_lab.config.identity import with_derived_settings
from ebc_lab.training import process
from ebc_lab.training.outcome import run_and_record
from ebc_lab.workloads import gpt


@pytest.mark.thorough
def test_stabilizers_that_hook_into_layers_are_known(run):
    """Compiled code may leave hooks out without a word."""
    for name in stabilizers.STABILIZERS:
        shape = replace(run, stabilizer=replace(run.stabilizer, name=name))
        model = gpt.build(shape.model, 20, 0)
        bases = optimizers.build(model, shape.optimizer, gpt.hidden_matrices(model))
        stabilizers.build(model, bases, None, with_derived_settings(shape))
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert hooked == (name in stabilizers.HOOKED), name
        assert (process.forward_of(model, replace(shape, compile="on")) is model) == hooked


def test_a_cpu_spends_no_time_on_numbers_below_1e_38_unless_the_run_is_exact(run):
    run = replace(run, stabilizer=replace(run.stabilizer, name="none"))
    small = torch.tensor([1e-39])
    for name, kept in (("none", False), ("verity", True), ("none", False)):
        process.set_up_torch(replace(run, determinism=replace(run.determinism, name=name)))
        assert bool(small * 2 > 0) == kept


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_a_compiled_run_is_the_eager_one_up_to_rounding_and_repeats_its_bits(run, tmp_path, budget):
    run = ebc(run, name=budget, target_kl=0.005)
    eager = run_and_record(run, tmp_path / "eager", "x")
    compiled = [run_and_record(replace(run, compile="on"), tmp_path / str(i), "x") for i in range(2)]
    assert compiled[0]["outcome"] == "completed"
    assert compiled[0]["val_loss"] == pytest.approx(eager["val_loss"], abs=2e-3)
    assert compiled[0]["kl_median"] == pytest.approx(eager["kl_median"], rel=0.05)
    assert (tmp_path / "0/steps.csv").read_bytes() == (tmp_path / "1/steps.csv").read_bytes()
