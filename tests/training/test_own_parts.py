"""Runs whose optimizer, stabilizer, learning-rate schedule and model are functions of the user's."""

import sys

import pytest
from support.runs import made, resolved

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.records.streams import read_columns
from ebc_lab.training.ends import Interrupted
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training

PARTS = """
import torch
from torch import nn

from ebc_lab.ebc import EllipsotopeClip


def optimizer(params, lr, betas=(0.9, 0.999)):
    few = [p for p in params if p.ndim < 2]
    rest = [p for p in params if p.ndim > 1]
    return [torch.optim.NAdam(rest, lr=lr, betas=betas), torch.optim.SGD(few, lr=lr)]


class Deaf(torch.optim.SGD):
    def __init__(self, params, lr, **options):
        super().__init__(params, lr)


class Passing(torch.optim.SGD):
    def __init__(self, params, **options):
        super().__init__(params, **options)


def some(params, lr):
    return torch.optim.SGD(params[1:], lr=lr)


def other_rate(params, lr):
    return torch.optim.SGD(params, lr=2 * lr)


def stabilizer(model, bases, target_kl, **options):
    return EllipsotopeClip(model, bases, target_kl=target_kl, **options)


def other_bases(model, bases, **options):
    return EllipsotopeClip(model, torch.optim.SGD(model.parameters(), lr=1e-2), target_kl=1.0, **options)


def schedule(step, steps, last=0.0):
    return 1 - (1 - last) * step / steps


def turning_negative(step, steps):
    return -1.0 if step == 2 else 1.0


class Model(nn.Module):
    def __init__(self, vocabulary, context, width=8):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width)])
        self.q_proj = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, vocabulary)
        self.drop = nn.Dropout(0.1)

    def forward(self, tokens):
        x = self.drop(self.embedding(tokens))
        return self.head(self.q_proj(self.blocks[0](x).tanh()))


class Unnamed(nn.Module):
    def __init__(self, vocabulary, context):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, tokens):
        return self.table(tokens)


class Short(Unnamed):
    def forward(self, tokens):
        return self.table(tokens)[:, -1]


def raising(*given, **further):
    raise KeyError("a mistake of mine")


def nothing(*given, **further):
    return None
"""


def part(group, name, *more):
    return [f"{group}=custom", f"{group}.target=own_lab_parts:{name}", *more]


LION = ["optimizer=custom", "optimizer.target=pytorch_optimizer:Lion"]
ALL = [
    *part("optimizer", "optimizer", "optimizer.arguments={betas: [0.8, 0.9]}"),
    *part("stabilizer", "stabilizer", "stabilizer.arguments.target_kl=1e-3"),
    *part("lr_schedule", "schedule", "lr_schedule.arguments.last=0.1"),
    *part("model", "Model", "model.arguments={width: 12}"),
]


@pytest.fixture
def own(tiny, tmp_path, monkeypatch):
    """Overrides -> a run, with the parts above in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_lab_parts.py").write_text(PARTS)
    usual = [o for o in tiny if not o.startswith(("lr_s", "cal", "fin", "model."))]

    def composed(*overrides):
        settings = [*usual, "model.context=16", "optimizer.lr=1e-2", "steps=12", *overrides]
        return resolved(run_part(compose(settings, study=False)))

    yield composed
    sys.modules.pop("own_lab_parts", None)
    from ebc_lab.config.own import sources

    sources._loaded.pop("own_lab_parts", None)


@pytest.mark.thorough
def test_all_four_train_together_and_resume_bit_for_bit(own, tmp_path):
    run = own(*ALL)
    whole = run_and_record(run, tmp_path / "whole", "whole")
    assert whole["outcome"] == "completed"
    columns = read_columns(tmp_path / "whole" / "steps.csv")
    assert columns["lr"][:3] == pytest.approx([1e-2 * (1 - 0.9 * t / 12) for t in range(3)])
    assert min(columns["c"]) < 1  # EBC acts
    folder = made(tmp_path / "parted")
    training = Training(run, folder)
    assert type(training.model).__name__ == "Model"
    assert training.model.head.in_features == 12
    assert [type(base).__name__ for base in training.optimizer.bases] == ["NAdam", "SGD"]
    assert training.optimizer.bases[0].param_groups[0]["betas"] == [0.8, 0.9]
    with pytest.raises(Interrupted):
        training.run(should_stop=lambda: training.step >= 5)
    again = Training(run, folder)
    assert again.step == 5
    assert again.run()["weights_checksum"] == whole["weights_checksum"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (part("optimizer", "nothing"), r"\(own_lab_parts.py:\d+\) returned NoneType, not a torch optimizer"),
        (part("optimizer", "some"), "leaves out 1 of the model's parameters, token_embedding.weight"),
        (part("optimizer", "other_rate"), "learning rate .0.02.*leave lr as it is given"),
        (part("optimizer", "optimizer", "optimizer.arguments={beta: 1}"), "unexpected keyword argument 'b"),
        (part("optimizer", "optimizer", "optimizer.arguments={lr: 1}"), "lr is given by the run itself"),
        (part("stabilizer", "nothing"), "returned NoneType, not a StabilizedOptimizer"),
        (part("stabilizer", "stabilizer"), "missing a required (keyword-only )?argument: 'target_kl'"),
        (part("stabilizer", "other_bases"), "wraps other optimizers than the run's"),
        (part("lr_schedule", "nothing"), "gave None for step 0 of 12: it must be a finite number >= 0"),
        (part("lr_schedule", "turning_negative"), r"\(own_lab_parts.py:\d+\) gave -1.0 for step 2"),
        (part("model", "nothing"), "returned NoneType, not a torch module"),
        (part("model", "Short"), r"makes \(2, \d+\) of tokens \(2, 16\), not logits \(2, 16, \d+\)"),
        (part("model", "Unnamed", "optimizer=muon"), "optimizer=muon needs hidden matrices"),
        (part("model", "Unnamed", "projection=stiefel"), "projection=stiefel needs hidden matrices"),
        (
            [*LION, "optimizer.arguments={wieght_decay: 1}"],
            "Lion takes wieght_decay and does nothing",
        ),
        (part("optimizer", "Deaf", "optimizer.arguments={beta: 1}"), "Deaf takes beta and does nothing"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused_in_a_sentence(own, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        Training(own(*overrides), made(tmp_path / "run")).run()


def test_what_a_class_passes_on_or_keeps_for_its_methods_is_no_mistake(own, tmp_path):
    passing = own(*part("optimizer", "Passing", "optimizer.arguments={momentum: 0.5}"))
    library = own(*LION, "optimizer.arguments={weight_decay: 0.1}")
    for name, run in {"passing": passing, "library": library}.items():
        [base] = Training(run, made(tmp_path / name)).optimizer.bases
        assert run.optimizer.arguments.items() <= base.defaults.items()


@pytest.mark.parametrize("group", ["optimizer", "stabilizer", "lr_schedule", "model"])
def test_what_a_function_raises_is_the_outcome_of_the_run(own, tmp_path, group):
    result = run_and_record(own(*part(group, "raising")), tmp_path / "run", "run")
    assert result["outcome"] == "failed"
    line = PARTS.splitlines().index('    raise KeyError("a mistake of mine")') + 1
    assert result["cause"] == f"own_lab_parts.py:{line}: KeyError: 'a mistake of mine'"
    assert 'own_lab_parts.py", line' in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.thorough
def test_a_failed_run_says_how_many_steps_it_took(own, tmp_path):
    with open(tmp_path / "own_lab_parts.py", "a", encoding="utf-8") as parts:
        parts.write("\n\ndef seven(step, steps):\n    return 1.0 / (7 - step) if step < 9 else 1.0\n")
    result = run_and_record(own(*part("lr_schedule", "seven")), tmp_path / "run", "run")
    assert (result["outcome"], result["steps"]) == ("failed", 7)
    assert len((tmp_path / "run" / "steps.csv").read_text().splitlines()) == 1 + 7
    assert "ZeroDivisionError" in result["cause"]


@pytest.mark.parametrize(
    "settings", [["optimizer=muon"], ["projection=stiefel"], ["budget.grouping=matrices"]]
)
def test_a_models_hidden_matrices_are_found_by_their_names(own, tmp_path, settings):
    training = Training(own(*part("model", "Model"), *settings), made(tmp_path / "run"))
    [matrix] = training.workload.matrices(training.model)
    assert matrix is training.model.q_proj.weight
    assert training.run()["outcome"] == "completed"


def test_a_file_that_was_edited_since_the_run_was_planned_is_refused(own, tmp_path):
    run = own(*part("optimizer", "optimizer"))
    (tmp_path / "own_lab_parts.py").write_text(PARTS + "\n# edited\n")
    with pytest.raises(UserError, match=r"own_lab_parts.py has changed since the run was planned"):
        run_and_record(run, tmp_path / "run", "run")
