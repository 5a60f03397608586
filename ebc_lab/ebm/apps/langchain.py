"""A model as a language model of LangChain, so that its chains and retrieval pipelines can call it.

Needs langchain-core: pip install 'ebc-lab[langchain]'.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

try:
    from langchain_core.callbacks import CallbackManagerForLLMRun
    from langchain_core.language_models.llms import LLM
    from pydantic import PrivateAttr
except ImportError as missing:
    raise ImportError(
        f"EBCLanguageModel needs langchain-core ({missing}): pip install 'ebc-lab[langchain]'"
    ) from None

from ..generate import Sampling
from .writer import Writer, Writing


class EBCLanguageModel(LLM):
    """An energy-based model that continues its prompt; `prompt | llm | parser` is a chain.

    Each setting of `writing` can be given with a call, too: `llm.invoke(text, tokens=50, stop=["\\n"])`, and
    `llm.bind(seed=1)` in a chain. ValueError for settings that are unknown or out of range, and as
    `Writer.continued`.
    """

    model: Any  # an EnergyModel
    tokenizer: Any  # encodes text to ids, and decodes them
    context: int  # tokens that the model looks back on
    sampling: Sampling = Sampling()
    writing: Writing = Writing()
    _weights: str = PrivateAttr(default="")

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        known = hashlib.sha256()
        for value in self.model.state_dict().values():  # statistics of the splats are no parameters
            if isinstance(value, Tensor):
                known.update(value.cpu().numpy().tobytes())
        self._weights = known.hexdigest()

    @property
    def _llm_type(self) -> str:
        return "ebc-lab-ebm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Return what LangChain's caches tell answers apart by."""
        model = {"model_name": self._llm_type, "weights": self._weights, "context": self.context}
        return model | {"sampling": asdict(self.sampling), "writing": asdict(self.writing)}

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own tokens; LangChain would fetch GPT-2's."""
        return list(self.tokenizer.encode(text))

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        known = asdict(self.writing)
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no setting of a call: it takes {', '.join(known)}")
        writer = Writer(self.model, self.tokenizer, self.context, self.sampling)
        return writer.continued(prompt, replace(self.writing, **kwargs), stop or ())
