"""First embeddings of tokens on the sphere: from the text's own counts, or GPT-2's (docs/ebm.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array

REACH = 4  # tokens to either side that count as near
NOISE = 0.1  # length of what is added where there are more dimensions than directions in the counts
PLAIN_UP_TO = 2048  # tokens in use, beyond which the largest singular values are found by random projection
POWER_STEPS = 4  # of that
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
KEYS = ("wte.weight", "transformer.wte.weight")

Floats = NDArray[np.float64]


def token_ids(name: str, tokens: ArrayLike, vocabulary: int, *, least: int) -> NDArray[np.int64]:
    """Return ids as int64 (L,). Raises ValueError for fewer than `least`, and for ids outside [0, V)."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or len(ids) < least or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be at least {least} token ids in one row, not {ids.dtype} of shape {ids.shape}."
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"{name} holds ids from {ids.min()} to {ids.max()}, outside [0, {vocabulary}): "
            "give the tokens' own vocabulary."
        )
    return ids.astype(np.int64, copy=False)


def cooccurrence(tokens: ArrayLike, vocabulary: int, n: int, seed: int) -> Tensor:
    """Make unit embeddings (V, n) float32 of a text's tokens, ids (L,): near where their company is the same.

    With C(a, b) how often a and b lie at most four tokens apart, the positive pointwise mutual information
    max(0, ln(C(a, b)·ΣC/(C(a)·C(b)))) = U·S·Vᵀ gives the rows U·√S of its n largest singular values (Levy,
    Goldberg & Dagan 2015; of many tokens by random projection: Halko, Martinsson & Tropp, arXiv:0909.4061),
    normalised. Where n is more than its rank, noise of length 0.1 fills the rest, and
    the rows are normalised again. A token without such company gets a random direction. The same for the same
    seed; raises ValueError for ids outside [0, V), less than two of them, and n < 2.
    """
    ids = token_ids("the text", tokens, vocabulary, least=1)
    if len(ids) < 2:
        raise ValueError("embeddings need at least two token ids in one row, not one.")
    if n < 2:
        raise ValueError(f"n={n} leaves no sphere to lie on: choose at least 2.")
    draw = np.random.Generator(np.random.Philox(key=seed))
    used, dense_ids = np.unique(ids, return_inverse=True)
    vectors, rank = _factors(_positive_information(dense_ids, len(used)), min(n, len(used)), draw)
    rows = np.zeros((vocabulary, n))
    rows[used, : vectors.shape[1]] = vectors
    rows = _normalised(rows)
    noise = draw.standard_normal(rows.shape) / np.sqrt(n)
    rows[~rows.any(1)] = noise[~rows.any(1)]  # tokens without company
    if n > rank:
        rows += NOISE * noise
    return torch.from_numpy(_normalised(rows).astype(np.float32))


def _positive_information(ids: NDArray[np.int64], size: int) -> csr_array:
    """Return the positive pointwise mutual information of tokens at most `REACH` apart, (size, size)."""
    from scipy.sparse import coo_array, csr_array

    one_way: csr_array = csr_array((size, size))
    for offset in range(1, min(REACH, len(ids) - 1) + 1):
        ones = np.ones(len(ids) - offset)
        one_way = one_way + coo_array((ones, (ids[:-offset], ids[offset:])), shape=(size, size)).tocsr()
    counts = (one_way + one_way.T).tocoo()
    a, b = counts.coords
    single = np.bincount(a, weights=counts.data, minlength=size)
    information = np.log(counts.data * counts.data.sum() / (single[a] * single[b]))
    return csr_array((np.maximum(information, 0.0), (a, b)), shape=(size, size))


def _factors(information: csr_array, most: int, draw: np.random.Generator) -> tuple[Floats, int]:
    """Return U·√S of the `most` largest singular values (V, most), and how many of them are not zero."""
    size = information.shape[0]
    if size <= PLAIN_UP_TO or most >= size:
        left, values, _ = np.linalg.svd(information.toarray())
    else:
        try:
            from sklearn.utils.extmath import randomized_svd
        except ImportError:
            raise ValueError(
                f"embeddings of {size} tokens need scikit-learn: pip install 'ebc-lab[ebm]', or use at most "
                f"{PLAIN_UP_TO} tokens."
            ) from None

        chance = np.random.RandomState(draw.bit_generator)
        left, values, _ = randomized_svd(information, most, n_iter=POWER_STEPS, random_state=chance)
    rank = int((values > values[0] * size * np.finfo(np.float64).eps).sum())
    values = np.where(np.arange(len(values)) < rank, values, 0.0)[:most]
    return _signed(left[:, :most]) * np.sqrt(values), rank


def _signed(columns: Floats) -> Floats:
    """Make each column's largest entry positive: a singular vector's own sign is the library's choice."""
    largest = np.abs(columns).argmax(0)
    return columns * np.where(columns[largest, np.arange(columns.shape[1])] < 0, -1.0, 1.0)


def _normalised(rows: Floats) -> Floats:
    """Make rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


# -- GPT-2's -------------------------------------------------------------------------------------------------


def load_gpt2(folder: str | Path, n: int) -> Tensor:
    """Read GPT-2's token embeddings from a local folder, as unit rows (V, n) float32.

    Their n principal components (about the mean) where n is less than their width, 768 in the smallest GPT-2,
    else they themselves with zeros behind. Reads `wte.weight`, with or without `transformer.` in front, from
    model.safetensors, else from pytorch_model.bin, without running code from it. Raises ValueError for a
    missing folder, file or key, a damaged file, and for what is no finite matrix.
    """
    if n < 2:
        raise ValueError(f"n={n} leaves no sphere to lie on: choose at least 2.")
    rows = gpt2_weight(folder).double()
    width = rows.shape[1]
    if n < width:
        rows = rows - rows.mean(0)
        axes = torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :n]  # eigh gives the smallest first
        rows = rows @ torch.from_numpy(_signed(axes.numpy()))
    filled = torch.zeros(len(rows), n, dtype=torch.float64)
    filled[:, : min(n, width)] = rows
    filled[~filled.any(1), 0] = 1.0  # a token without a direction
    return torch.nn.functional.normalize(filled, dim=1).float()


def gpt2_weight(folder: str | Path) -> Tensor:
    """Read GPT-2's token embeddings as a local folder has them, (V, width). Raises as `load_gpt2` does."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder: name the one that holds GPT-2's {WEIGHT_FILES[0]}.")
    present = [place / name for name in WEIGHT_FILES if (place / name).is_file()]
    if not present:
        raise ValueError(f"{place} has neither {' nor '.join(WEIGHT_FILES)}: put GPT-2's weights there.")
    try:
        weight = _token_weight(present[0])
    except ImportError:
        raise ValueError(f"{present[0]} needs safetensors: pip install 'ebc-lab[ebm]'.") from None
    except Exception as error:  # each library raises its own classes
        why = str(error).partition("\n")[0]
        raise ValueError(f"{present[0]} cannot be read ({why}): download it again.") from None
    if weight is None:
        raise ValueError(f"{present[0]} has no {' or '.join(KEYS)}, so it is not of a GPT-2: give GPT-2's.")
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(
            f"the token embeddings in {folder} are {weight.dtype} of shape {tuple(weight.shape)}, "
            "not a matrix of numbers (tokens, width): give GPT-2's."
        )
    if not bool(weight.isfinite().all()):
        raise ValueError(f"the token embeddings in {folder} hold NaN or infinities: download them again.")
    return weight


def _token_weight(path: Path) -> Tensor | None:
    if path.suffix != ".safetensors":
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return next((state[key] for key in KEYS if key in state), None)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        key = next((key for key in KEYS if key in file.keys()), None)  # noqa: SIM118
        weight: Tensor | None = file.get_tensor(key) if key else None
    return weight
