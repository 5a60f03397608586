"""A trainer behind the familiar names: rows of numbers train a quantized perceptron, text the lab's GPT."""

from .loop import HybridLLMTrainer as HybridLLMTrainer
from .settings import TrainingConfig as TrainingConfig
