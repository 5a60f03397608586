"""Embeddings from counts, against counting pair by pair, and from folders that stand in for GPT-2's."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ebc_lab.ebm import embeddings
from ebc_lab.ebm.embeddings import cooccurrence, load_gpt2
from ebc_lab.ebm.sphere import normalise


def text(vocabulary, length=400, seed=0):
    """Ids whose frequencies and successors differ, so that their information is not zero."""
    draw = np.random.default_rng(seed)
    follows = draw.dirichlet(np.full(vocabulary, 0.3), vocabulary)
    ids = [0]
    for _ in range(length - 1):
        ids.append(int(draw.choice(vocabulary, p=follows[ids[-1]])))
    return np.array(ids, np.int64)


def plain_rows(ids, vocabulary, n):
    """U·√S of the positive pointwise mutual information, counted pair by pair, rows normalised."""
    counts = np.zeros((vocabulary, vocabulary))
    for i in range(len(ids)):
        for j in range(len(ids)):
            if 1 <= abs(i - j) <= 4:
                counts[ids[i], ids[j]] += 1
    information = np.zeros_like(counts)
    for a in range(vocabulary):
        for b in range(vocabulary):
            if counts[a, b]:
                ratio = counts[a, b] * counts.sum() / (counts[a].sum() * counts[b].sum())
                information[a, b] = max(0.0, math.log(ratio))
    left, values, _ = np.linalg.svd(information)
    rows = (left * np.sqrt(values))[:, :n]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- from counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 12])
def test_angles_are_those_of_counting_pair_by_pair(n):
    ids = text(12)
    rows = cooccurrence(ids, 12, n, seed=0)
    expected = plain_rows(ids, 12, n)
    np.testing.assert_allclose(rows @ rows.T, expected @ expected.T, atol=1e-5)


@pytest.mark.parametrize("ids", [[0, 0], [1, 0], [2] * 9, [0, 1, 2, 3, 4, 5]])
def test_texts_that_say_nothing_still_have_unit_vectors(ids):
    rows = cooccurrence(np.array(ids), 6, 4, seed=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("n", [2, 16, 200])
def test_rows_are_unit_vectors_and_follow_from_the_seed(n):
    ids = text(30)
    rows = cooccurrence(ids, 30, n, seed=5)
    assert rows.shape == (30, n)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(30))
    assert torch.equal(rows, cooccurrence(torch.from_numpy(ids), 30, n, seed=5))


def test_more_dimensions_than_directions_are_filled_with_a_little_noise():
    ids = text(10)
    rows = cooccurrence(ids, 10, 400, seed=1)
    cosine = plain_rows(ids, 10, 10)
    cosine = (cosine @ cosine.T)[np.triu_indices(10, 1)]
    found = (rows @ rows.T).numpy()[np.triu_indices(10, 1)]
    np.testing.assert_allclose(found, cosine / 1.01, atol=0.02)  # of lengths 1 and 0.1, at right angles
    other = cooccurrence(ids, 10, 400, seed=2)
    torch.testing.assert_close((rows * other).sum(1), torch.full((10,), 1 / 1.01), rtol=0, atol=0.02)
    assert (rows[:, 10:].norm(dim=1) > 0.09).all()


def test_tokens_never_seen_get_directions_of_their_own():
    ids = text(6)
    ids[ids == 3] = 4
    rows = cooccurrence(ids, 500, 64, seed=0)
    unseen = rows[[3, *range(6, 500)]]
    torch.testing.assert_close(unseen.norm(dim=1), torch.ones(495))
    cosines = (unseen @ unseen.T).fill_diagonal_(0)
    assert float(cosines.abs().max()) < 0.7
    assert not torch.equal(rows[3], cooccurrence(ids, 500, 64, seed=1)[3])


def test_a_large_vocabulary_gives_the_same_angles_by_random_projection(monkeypatch):
    ids = text(40, length=3000)
    exact = cooccurrence(ids, 40, 30, seed=0)
    monkeypatch.setattr(embeddings, "PLAIN_UP_TO", 10)
    projected = cooccurrence(ids, 40, 30, seed=0)
    torch.testing.assert_close(projected @ projected.T, exact @ exact.T, rtol=0, atol=1e-4)
    assert torch.equal(projected, cooccurrence(ids, 40, 30, seed=0))


@pytest.mark.parametrize(
    ("ids", "vocabulary", "n", "message"),
    [
        (np.array([0]), 3, 2, "at least two token ids"),
        (np.zeros((2, 2), np.int64), 3, 2, r"not int64 of shape \(2, 2\)"),
        (np.array([0.0, 1.0]), 3, 2, "not float64"),
        (np.array([0, 3]), 3, 2, r"from 0 to 3, outside \[0, 3\)"),
        (np.array([-1, 2]), 3, 2, r"from -1 to 2, outside \[0, 3\)"),
        (np.array([0, 1]), 3, 1, "n=1 leaves no sphere"),
    ],
)
def test_what_is_no_text_is_refused(ids, vocabulary, n, message):
    with pytest.raises(ValueError, match=message):
        cooccurrence(ids, vocabulary, n, seed=0)


# -- from a folder -------------------------------------------------------------------------------------------


def weights(tokens=20, width=12, seed=0):
    """Embeddings about a mean that is not zero, as GPT-2's are."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) + 0.7


@pytest.fixture
def folder(tmp_path):
    """A safetensors file, which goes before a pickle."""
    save_file({"wte.weight": weights(), "wpe.weight": torch.zeros(4, 12)}, tmp_path / "model.safetensors")
    torch.save({"wte.weight": weights(seed=1)}, tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize("n", [2, 5, 11])
def test_fewer_dimensions_are_the_principal_components(folder, n):
    rows = load_gpt2(folder, n)
    centred = (weights() - weights().mean(0)).double()
    axes = torch.linalg.svd(centred).Vh[:n]
    expected = normalise(centred @ axes.T)
    assert rows.shape == (20, n)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows @ rows.T, (expected @ expected.T).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [12, 30])
def test_more_dimensions_are_filled_with_zeros(folder, n):
    rows = load_gpt2(str(folder), n)
    torch.testing.assert_close(rows[:, :12], normalise(weights()))
    assert not rows[:, 12:].any()
    assert rows.shape == (20, n)


@pytest.mark.parametrize("key", ["wte.weight", "transformer.wte.weight"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_both_files_and_both_names_of_the_weight_are_read(tmp_path, file, key):
    state = {key: weights().to(torch.float16), "lm_head.weight": torch.zeros(2)}
    state[key][4] = 0  # a token without a direction gets one
    (save_file if file == "model.safetensors" else torch.save)(state, tmp_path / file)
    rows = load_gpt2(tmp_path, 15)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))
    others = [i for i in range(20) if i != 4]
    torch.testing.assert_close(rows[others, :12], normalise(weights())[others], rtol=0, atol=1e-3)


def test_a_pickle_runs_no_code(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"wte.weight": weights(), "more": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read"):
        load_gpt2(tmp_path, 4)
    assert not (tmp_path / "ran").exists()


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_gpt2(tmp_path / "nowhere", 4)
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_gpt2(tmp_path, 4)
    with pytest.raises(ValueError, match="n=1 leaves no sphere"):
        load_gpt2(tmp_path, 1)
    for name in ("pytorch_model.bin", "model.safetensors"):  # the second goes before the first
        (tmp_path / name).write_bytes(b"PK, but no archive")
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            load_gpt2(tmp_path, 4)
    save_file({"embedding": weights()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no wte\.weight or transformer\.wte\.weight"):
        load_gpt2(tmp_path, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(12), r"of shape \(12,\)"),
        (torch.ones(0, 12), r"of shape \(0, 12\)"),
        (torch.ones(3, 4, 5), r"of shape \(3, 4, 5\)"),
        (torch.ones(3, 4, dtype=torch.int64), "int64"),
        (torch.full((3, 4), torch.nan), "NaN or infinities"),
    ],
)
def test_other_weights_are_refused(tmp_path, given, message):
    save_file({"wte.weight": given}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_gpt2(tmp_path, 4)
