from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Mode, Part, Run
from .data import set_for_a_text
from .model import IMAGE_MODELS, TEXT_MODELS

FEW_IMAGES = 16  # the fewest images to choose a budget's c on; a KL over fewer is mostly chance


@dataclass
class WorkloadConfig(Part):
    """What is trained: a language model, an energy-based one on the sphere (docs/ebm.md), or a classifier of
    small images."""

    name: str = setting("gpt", "which workload", group="workload")

    off = "gpt"
    place = 140
    unfit_for = dict.fromkeys(
        (Mode.EXACT, Mode.SEVERAL_PROCESSES), "only the GPT is built for that; choose workload=gpt"
    )
    words = {"ebm": "energy-based model", "images": "images"}

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name != "images":
            if run.data.name == "digits":
                yield f"data=digits is images, and workload={self.name} reads text: choose workload=images."
            if run.model.name in IMAGE_MODELS:
                yield (
                    f"model={run.model.name} is a model of images, and workload={self.name} reads text: "
                    "choose workload=images."
                )
            return
        if run.model.name not in IMAGE_MODELS:
            of_text = run.model.name in TEXT_MODELS
            named = f"model={run.model.name}" if of_text else "a model of your own"
            yield f"workload=images takes model=cnn or vit, not {named}, which reads tokens."
        if run.data.name != "digits":
            yield f"workload=images takes data=digits, not data={run.data.name}, which is a text."
        if run.model.context != 1:
            yield "workload=images has one prediction for each image: leave model.context=1."
        for key in set_for_a_text(run):
            yield f"workload=images does not go with {key}, which is about a text: leave it at its default."
        if run.compile == "on":
            yield "workload=images is not compiled: choose compile=off."

    def warnings(self, run: Run) -> Iterator[str]:
        rows = run.budget.probe_sequences
        if self.name == "images" and run.stabilizer.name == "ebc" and rows < FEW_IMAGES:
            yield (
                f"budget.probe_sequences={rows}: so few images choose c, and a KL of them is mostly chance; "
                "give it half of a larger batch, batch_size=64 budget.probe_sequences=32."
            )


def fit_to_images(composed: Any, given: Container[str]) -> None:
    """Change a composed configuration of workload=images to data=digits, model=cnn and one prediction per
    image, except for the settings in `given`, which the user has set."""
    if composed.workload.name != "images":
        return
    if "data" not in given and composed.data.name == "auto":
        composed.data.name = "digits"
    if "model" not in given and composed.model.name == "gpt":
        composed.model.name = "cnn"
    if "model.context" not in given:
        composed.model.context = 1
