"""The trainer behind the familiar names: what it refuses, what it learns, how it resumes, what it counts."""

from __future__ import annotations

import hashlib
import io
import math
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import pytest
import torch

from ebc_lab.lowbit import HybridLLMTrainer, TrainingConfig, quantize
from ebc_lab.lowbit.container import DamagedFileError
from ebc_lab.lowbit.policy import Observed, Policy
from ebc_lab.lowbit.trainer import loop, models
from ebc_lab.lowbit.trainer.data import CONTEXT, Rows, Text, tokens_of
from ebc_lab.lowbit.trainer.run import write_checkpoint


def low_rank(rows: int = 200, columns: int = 12, seed: int = 0) -> np.ndarray:
    """Rows with three degrees of freedom and a little noise: something a small perceptron learns quickly."""
    rng = np.random.default_rng(seed)
    inner = np.tanh(rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns)))
    return (inner + 0.05 * rng.standard_normal((rows, columns))).astype(np.float32)


def small(**settings: object) -> TrainingConfig:
    given = {"max_epochs": 4, "batch_size": 16, "hidden": 24, "n_clusters": 4, "learning_rate": 4e-3}
    return TrainingConfig(**(given | settings))


def weights(trainer: HybridLLMTrainer) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in trainer.model.parameters()]


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("n_clusters", 0),
        ("max_epochs", True),
        ("max_steps", 0),
        ("learning_rate", 0.0),
        ("validation_share", 1.0),
        ("levels", "seven"),
        ("quantize_weights", "yes"),
        ("checkpoint_dir", 3),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_in_a_sentence(name: str, value: object):
    with pytest.raises(ValueError, match=f"^{name} is .*: give .*\\.$"):
        TrainingConfig(**{name: value})
    config = TrainingConfig()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{name} is "):
        HybridLLMTrainer(config)


# -- data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((1, 5), np.float32), "has 1 row"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
        (np.array([["a", "b"]]), "no array of real numbers"),
        ([[1.0], [1.0, 2.0]], "no array of real numbers"),
        ("short", "the text has 5 tokens"),
        (np.array([3, -1, 2]), "tokens run from -1 to 3"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_a_sentence(data: object, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        HybridLLMTrainer(small()).train(data)
    assert "\n" not in str(caught.value)


def test_nan_and_infinity_are_refused_with_count_and_first_place():
    data = low_rank()
    data[7, 3] = np.nan
    data[9, 0] = np.inf
    with pytest.raises(ValueError, match=r"training_data has 2 values .* first at \(7, 3\)"):
        HybridLLMTrainer(small()).train(data)
    wide = low_rank().astype(np.float64)
    wide[5, 1] = 1e300  # no float32
    with pytest.raises(ValueError, match=r"training_targets has 1 values .* first at \(5, 1\)"):
        HybridLLMTrainer(small()).train(low_rank(), wide)
    with pytest.raises(ValueError, match="training_targets has 5 rows, but training_data 200"):
        HybridLLMTrainer(small()).train(low_rank(), low_rank(5))


def test_the_last_rows_are_for_validation_and_never_drawn():
    data = np.arange(40, dtype=np.float32).reshape(20, 2)
    source = Rows(data, None, small(validation_share=0.25, batch_size=5))
    seen = torch.cat([source.batch(step)[0][:, 0] for step in range(30)])
    assert set(seen.tolist()) == set(range(0, 30, 2))
    kept = torch.cat([inputs for inputs, _ in source.validation()])
    assert np.array_equal(kept.numpy(), data[15:])
    assert source.steps_per_epoch == 3


def test_a_text_batch_is_windows_and_what_follows_them():
    tokens = np.arange(1000)
    source = Text(tokens, small(batch_size=7, n_clusters=3))
    starts = set()
    for step in range(40):
        inputs, targets = source.batch(step)
        assert inputs.shape == (7, CONTEXT)
        assert torch.equal(inputs + 1, targets)
        assert int(targets.max()) < 900  # what comes after is for validation
        starts |= set(inputs[:, 0].tolist())
    assert len({start % CONTEXT for start in starts}) > CONTEXT // 2
    first = next(source.validation())[0]
    assert int(first[0, 0]) == 900


def test_text_can_be_a_string_a_path_or_the_name_of_a_file(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("abcabca", encoding="utf-8")
    expected = [0, 1, 2, 0, 1, 2, 0]
    marked = tmp_path / "marked.txt"
    marked.write_text("\ufeffabcabca", encoding="utf-8")  # a byte order mark, as some editors write it
    for given in ("abcabca", path, str(path), marked, expected, torch.tensor(expected)):
        assert tokens_of(given).tolist() == expected
    assert tokens_of("zebra, aged").tolist() == [8, 5, 3, 7, 2, 1, 0, 2, 6, 5, 4]  # of the sorted characters
    assert len(tokens_of("to be or not to be " * 200)) == 3800  # longer than a file's name may be
    with pytest.raises(ValueError, match=r"nothing\.txt cannot be read as text"):
        tokens_of(tmp_path / "nothing.txt")


# -- learning ------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_reported_losses_are_those_of_the_codes():
    data = low_rank()
    trainer = HybridLLMTrainer(small())
    summary = trainer.train(data)
    assert summary["total_steps"] == 4 * 12  # 180 rows in batches of 16
    assert [record["epoch"] for record in summary["metrics_history"]] == [1, 2, 3, 4]
    assert summary["total_loss_reduction"] == summary["initial_loss"] - summary["final_loss"] > 0
    codes = trainer.quantized_weights()
    assert list(codes) == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    assert [q.shape for q in codes.values()] == [(24, 12), (24, 24), (12, 24)]
    state = trainer.model.state_dict()
    x = torch.from_numpy(data[180:]) / state["scales"][0]
    for index, quantized in enumerate(codes.values()):
        assert set(np.unique(quantized.codes)) <= {-2, -1, 0, 1, 2}
        x = torch.nn.functional.gelu(x) if index else x
        x = x @ torch.from_numpy(quantized.values()).T + state[f"layers.{index}.bias"]
    loss = (x * state["scales"][1] - torch.from_numpy(data[180:])).square().mean()
    assert summary["final_loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.thorough
def test_targets_of_another_width_and_unit():
    rows = low_rank(300, 5)
    targets = 1e-6 * (rows[:, :2] - 2 * rows[:, 2:4])
    summary = HybridLLMTrainer(small(max_epochs=6)).train(rows * 1e4, targets)
    assert summary["final_loss"] < 0.3 * summary["zero_predictor_loss"] < 1e-10


def test_own_loss_and_evaluation_are_used():
    calls = []

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).abs().mean()

    def evaluate(model: torch.nn.Module) -> float:
        calls.append(model)
        return len(calls) / 2

    data = low_rank()
    trainer = HybridLLMTrainer(small(max_epochs=3))
    summary = trainer.train(data, loss_fn=loss, eval_fn=evaluate)
    assert [record["eval"] for record in summary["metrics_history"]] == [0.5, 1.0, 1.5]
    assert calls == [trainer.model] * 3
    assert summary["zero_predictor_loss"] == pytest.approx(np.abs(data[180:]).mean(), rel=1e-5)


def test_a_loss_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match="loss_fn must return a 0-dim tensor"):
        HybridLLMTrainer(small()).train(low_rank(), loss_fn=lambda prediction, target: target.mean())


def test_a_step_without_a_finite_loss_is_skipped_and_moves_nothing():
    trainer = HybridLLMTrainer(small(max_epochs=1))
    summary = trainer.train(low_rank(), loss_fn=lambda p, t: (p - t).square().mean() * math.inf)
    assert summary["optimizer_summary"]["skipped_steps"] == summary["total_steps"] == 12
    assert not moved_since_the_start(trainer, low_rank()).any()


def moved_since_the_start(trainer: HybridLLMTrainer, data: np.ndarray) -> torch.Tensor:
    """How far each weight is from where a perceptron of these settings begins."""
    before = models.Perceptron([12, 24, 24, 12], Rows(data, None, small()).scales, 0)
    pairs = zip(trainer.model.parameters(), before.parameters(), strict=True)
    return torch.cat([(a - b).detach().reshape(-1) for a, b in pairs])


def test_the_trust_region_bounds_the_whole_update(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "RADIUS", 0.01)
    data = low_rank()
    trainer = HybridLLMTrainer(small(max_steps=1))
    summary = trainer.train(data)["optimizer_summary"]
    moves = moved_since_the_start(trainer, data)
    moved = float(moves.norm())
    count = len(moves)
    assert moved == pytest.approx(0.01 * 4e-3 * math.sqrt(count), rel=1e-3)
    assert summary["trust_radius"] == pytest.approx(moved, rel=1e-3)
    assert summary["constraints_active"] == summary["constraints_active_share"] == 1


class Recorded(Policy):
    """A constant policy that keeps what it is told."""

    def __init__(self, factors: tuple[float, float] = (1.0, 1.0)) -> None:
        self.answer = factors
        self.seen: list[Observed] = []
        self.told: list[tuple[int, float, bool]] = []  # at how many observations, the cosine, clipped

    def factors(self, step: int, seen: Observed) -> tuple[float, float]:
        self.seen.append(seen)
        return self.answer

    def feedback(self, cosine: float, clipped: bool) -> None:
        self.told.append((len(self.seen), cosine, clipped))


def test_the_policy_hears_of_every_step_on_the_next_batch(monkeypatch: pytest.MonkeyPatch):
    policy = Recorded()
    monkeypatch.setattr(loop, "make_policy", lambda name, seed: policy)
    config = small(max_steps=3, quantize_gradients=False, quantize_weights=False)
    data = low_rank()
    points = []

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            points.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]))
        return (prediction - target).square().mean()

    trainer = HybridLLMTrainer(config)
    trainer.train(data, loss_fn=loss)
    assert [told[0] for told in policy.told] == [1, 2]
    assert [seen.progress for seen in policy.seen] == [0, 1 / 3, 2 / 3]
    update = points[2] - points[1]
    assert policy.seen[2].update_norm == pytest.approx(float(update.norm()), rel=1e-4)
    last = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()])  # of the third step
    cosine = float(torch.nn.functional.cosine_similarity(last, update, dim=0))
    assert policy.told[1][1] == pytest.approx(cosine, rel=1e-3)
    assert policy.seen[2].clipped == policy.told[1][2]


def test_both_factors_scale_what_they_should(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "make_policy", lambda name, seed: Recorded((0.5, 3.0)))
    data = low_rank()
    trainer = HybridLLMTrainer(small(max_steps=1))
    summary = trainer.train(data)["optimizer_summary"]
    moves = moved_since_the_start(trainer, data)
    assert float(moves.abs().max()) == pytest.approx(2e-3, rel=1e-3)  # Adam's first step is the rate
    count = len(moves)
    assert summary["learning_rate"] == 2e-3
    assert summary["trust_radius"] == pytest.approx(3 * loop.RADIUS * 4e-3 * math.sqrt(count))
    assert summary["constraints_active"] == 0  # half of the rate is within 0.9 of it


@pytest.mark.parametrize("levels", ["ternary", "five"])
def test_adam_sees_gradients_in_few_levels(levels: str):
    trainer = HybridLLMTrainer(small(levels=levels, max_steps=1))
    trainer.train(low_rank())
    most = {"ternary": 3, "five": 5}[levels]
    for name, p in trainer.model.named_parameters():
        count = len(p.grad.unique())
        assert (count <= most) == (p.ndim == 2), name


def test_plain_training_is_torch_adam_through_the_quantizer():
    """The fast path against the maths written out: same batches, straight-through gradients, Adam."""
    data = low_rank()
    config = small(use_adaptive_lr=False, quantize_gradients=False, max_steps=6)
    trainer = HybridLLMTrainer(config)
    summary = trainer.train(data)["optimizer_summary"]
    assert (summary["policy"], summary["constraints_active"]) == ("constant", 0)
    source = Rows(data, None, config)
    model = models.Perceptron([12, 24, 24, 12], source.scales, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(6):
        x, y = source.batch(step)
        latents = [layer.weight.data for layer in model.layers]
        for layer, latent in zip(model.layers, latents, strict=True):
            layer.weight.data = torch.from_numpy(quantize(latent, "five").values())
        optimizer.zero_grad()
        ((model(x) - y).square().mean() / source.unit).backward()
        for layer, latent in zip(model.layers, latents, strict=True):
            layer.weight.data = latent
        optimizer.step()
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# -- counting ------------------------------------------------------------------------------------------------


def test_bytes_are_counted_by_hand():
    trainer = HybridLLMTrainer(small(levels="ternary", max_steps=1))
    summary = trainer.train(low_rank())
    hidden = [24 * 12, 24 * 24, 12 * 24]
    packed = sum(-(-n // 5) + 4 for n in hidden)
    rest = 4 * (24 + 24 + 12) + 8
    assert summary["compression"] == {
        "hidden_matrices": 4 * sum(hidden) / packed,
        "whole_model": (4 * sum(hidden) + rest) / (packed + rest),
        "hidden_bytes": packed,
        "hidden_bytes_float32": 4 * sum(hidden),
        "model_bytes": packed + rest,
        "model_bytes_float32": 4 * sum(hidden) + rest,
    }
    assert summary["bits_per_weight"] == 8 * packed / sum(hidden)
    assert summary["optimizer_summary"]["gradient_bits"] == 8 * packed / sum(hidden)


def test_a_float_model_says_32_bits_and_has_no_codes():
    trainer = HybridLLMTrainer(small(quantize_weights=False, quantize_gradients=False, max_steps=1))
    summary = trainer.train(low_rank())
    assert summary["bits_per_weight"] == 32.0
    assert summary["compression"]["whole_model"] == 1.0
    assert summary["optimizer_summary"]["gradient_bits"] == 32.0
    with pytest.raises(ValueError, match="quantize_weights=False"):
        trainer.quantized_weights()


def test_sizes_can_be_chosen():
    trainer = HybridLLMTrainer(small(max_steps=1), model_dim=10, num_layers=3)
    with pytest.raises(ValueError, match="call train or load_checkpoint first"):
        trainer.get_training_summary()
    trainer.train(low_rank())
    shapes = [q.shape for q in trainer.quantized_weights().values()]
    assert shapes == [(10, 12), (10, 10), (10, 10), (10, 10), (12, 10)]
    with pytest.raises(ValueError, match="model_dim is 0"):
        HybridLLMTrainer(model_dim=0)


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"levels": "ternary", "use_adaptive_lr": False}])
def test_an_interrupted_training_resumes_to_the_same_bits(settings: dict[str, object], tmp_path: Path):
    data = low_rank()
    whole = HybridLLMTrainer(small(**settings))
    expected = whole.train(data)

    interrupted = HybridLLMTrainer(small(checkpoint_dir=tmp_path / "kept", **settings))

    def die_in_the_third(model: torch.nn.Module) -> None:
        if len(interrupted.get_training_summary()["metrics_history"]) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.train(data, eval_fn=die_in_the_third)
    resumed = HybridLLMTrainer(small(**settings))
    resumed.load_checkpoint(tmp_path / "kept" / loop.CHECKPOINT)
    assert resumed.get_training_summary()["total_steps"] == 24
    got = resumed.train(data)
    assert weights(resumed) == weights(whole)
    for record in (*got["metrics_history"], *expected["metrics_history"]):
        del record["time"]
    assert got["metrics_history"] == expected["metrics_history"]
    assert got["optimizer_summary"] == expected["optimizer_summary"]


def test_a_checkpoint_is_of_its_settings_and_its_data(tmp_path: Path):
    path = tmp_path / "one.ebctrain"
    trainer = HybridLLMTrainer(small(max_steps=2))
    trainer.train(low_rank())
    trainer.save_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["one.ebctrain"]
    with pytest.raises(ValueError, match="made with levels='five', not 'ternary'"):
        HybridLLMTrainer(small(levels="ternary")).load_checkpoint(path)
    longer = HybridLLMTrainer(small(max_steps=3))
    longer.load_checkpoint(path)
    with pytest.raises(ValueError, match="other data"):
        longer.train(low_rank(seed=1))
    assert longer.train(low_rank())["total_steps"] == 3
    assert longer.train(low_rank(seed=1))["total_steps"] == 3  # from the start


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path):
    path = tmp_path / "one.ebctrain"
    trainer = HybridLLMTrainer(small(max_steps=1))
    trainer.train(low_rank())
    trainer.save_checkpoint(path)
    content = path.read_bytes()
    for wrong in (content[:-1], content[:20], content + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(DamagedFileError, match=r"one\.ebctrain is damaged.*: restore it"):
            trainer.load_checkpoint(path)
    path.write_bytes(b"PK\3\4 something else")
    with pytest.raises(DamagedFileError, match=r"one\.ebctrain is no checkpoint"):
        trainer.load_checkpoint(path)
    whole = torch.load(io.BytesIO(content[40:]), weights_only=True)
    for other in (
        *(3, {}, whole | {"settings": {}}, whole | {"run": whole["run"] | {"step": "2"}}),
        whole | {"settings": whole["settings"] | {"use_adaptive_lr": torch.zeros(2, 2)}},
        *(whole | {"run": whole["run"] | {name: {}}} for name in ("model", "kind")),
        *(whole | {"run": whole["run"] | {name: [3]}} for name in ("losses", "history")),
    ):
        write_checkpoint(path, other)
        with pytest.raises(DamagedFileError, match=r"one\.ebctrain is damaged: it is not what") as refused:
            trainer.load_checkpoint(path)
        assert "\n" not in str(refused.value)
    sealed = hashlib.sha256(b"no zip").digest() + b"no zip"
    path.write_bytes(content[:8] + sealed)
    with pytest.raises(DamagedFileError, match=r"content is none of this trainer's"):
        trainer.load_checkpoint(path)


# -- text ----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_text_trains_the_gpt(small_text: str):
    config = TrainingConfig(max_epochs=2, max_steps=24, batch_size=4, learning_rate=4e-3, n_clusters=4)
    trainer = HybridLLMTrainer(config, model_dim=32, num_layers=1)
    summary = trainer.train(small_text)
    letters = len(set(small_text))
    assert summary["zero_predictor_loss"] == pytest.approx(math.log(letters), rel=1e-6)
    assert summary["initial_loss"] == pytest.approx(math.log(letters), rel=0.05)
    assert summary["final_loss"] < summary["initial_loss"] - 0.4
    codes = trainer.quantized_weights()
    assert len(codes) == 6
    assert all("blocks.0." in name for name in codes)


def test_without_the_lab_text_is_refused_in_a_sentence(small_text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "entry_points", lambda **_: EntryPoints(list[EntryPoint]()))
    with pytest.raises(ImportError, match=r"install ebc-lab"):
        HybridLLMTrainer(TrainingConfig(max_steps=1)).train(small_text)
