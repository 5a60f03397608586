"""Floating-point operations of training a GPT, from its shape, and the GPU hours that they come to. No torch.

After Kaplan et al., arXiv:2001.08361, appendix B: 6 operations for each token and element of a matrix.
"""

from __future__ import annotations

from ebc_lab.config.parts.model import GPT, ModelConfig
from ebc_lab.config.schema import RunConfig

GPU = "H100 SXM"
PEAK = 989.4e12  # FLOP/s of its dense bfloat16 products, by its maker's data sheet
UTILISATION = 0.40  # of them, assumed
VOCABULARIES = {"bytes": 256, "gpt2": 50257}


def step_flops(elements: int, blocks: int, context: int, width: int, tokens: int) -> dict[str, float]:
    """Return operations of one forward and backward pass on so many tokens, in sequences of `context`.

    * matrices: 6·P·tokens, where P is the number of elements of the matrices that tokens are multiplied with.
      Each costs a token 2 operations forwards and 4 backwards. Embeddings are look-ups and cost none; norms,
      GELU, softmax and the loss are left out.
    * attention: 12·L·T·d·tokens. In each of L layers the scores and their product with the values cost a
      token 2·T·d operations each forwards, and twice that backwards. The complete T × T square is counted, as
      is usual; a kernel that skips the masked half does half of it.
    """
    matrices = 6.0 * elements * tokens
    attention = 12.0 * blocks * context * width * tokens
    return {"matrices": matrices, "attention": attention, "total": matrices + attention}


def block_elements(model: ModelConfig) -> int:
    """Return the elements of the matrices in a GPT's blocks: attention 4·d², MLP 8·d² in each."""
    return 12 * model.blocks * model.width**2


def run_flops(run: RunConfig) -> float | None:
    """Return the operations of all steps of a run, without evaluations and what a stabilizer measures; None
    of a model that is no GPT, or in tokens whose number only the text tells."""
    vocabulary = VOCABULARIES.get(run.tokens.name, run.tokens.size if run.tokens.name == "bpe" else None)
    if run.data.name == "bin":
        vocabulary = run.data.vocabulary
    if vocabulary is None or run.workload.name != "gpt" or run.model.name not in (*GPT, "modern"):
        return None
    model = run.model
    elements, tokens = block_elements(model) + vocabulary * model.width, run.tokens_per_step
    return run.steps * step_flops(elements, model.blocks, model.context, model.width, tokens)["total"]


def gpu_hours(flops: float) -> float:
    """Return the hours of one such GPU at the assumed utilisation."""
    return flops / (PEAK * UTILISATION) / 3600
