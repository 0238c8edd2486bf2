"""The models that train: timm's transformers, and a small one over bytes."""

from switchlora.models.text import CausalTransformer
from switchlora.models.vision import create_model, eval_mode, load_weights

__all__ = ["CausalTransformer", "create_model", "eval_mode", "load_weights"]
