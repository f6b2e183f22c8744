"""Unlearning that erases instead of hiding: the Ssiuu penalty (arXiv 2509.22263), fast."""

from importlib import import_module

from ssiuu_fast import ops
from ssiuu_fast.attribution import Attribution, attribute
from ssiuu_fast.influence import influence_variation
from ssiuu_fast.ops import answer_token_counts, sequence_log_probs, sequence_log_probs_from_hidden
from ssiuu_fast.regularizer import SSIUURegularizer
from ssiuu_fast.regularizer_file import load_regularizer, save_regularizer

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "SSIUURegularizer",
    "UnlearningConfig",
    "UnlearningTrainer",
    "answer_token_counts",
    "attribute",
    "influence_variation",
    "load_regularizer",
    "ops",
    "save_regularizer",
    "sequence_log_probs",
    "sequence_log_probs_from_hidden",
]

# what needs transformers is imported where it is asked for: the drop-in needs torch alone
_ON_TRANSFORMERS = {"UnlearningConfig": "ssiuu_fast.trainer_config", "UnlearningTrainer": "ssiuu_fast.trainer"}


def __getattr__(name: str):
    if name not in _ON_TRANSFORMERS:
        raise AttributeError(f"module 'ssiuu_fast' has no attribute {name!r}")
    return getattr(import_module(_ON_TRANSFORMERS[name]), name)
