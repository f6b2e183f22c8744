"""Unlearning that erases instead of hiding: the Ssiuu penalty (arXiv 2509.22263), fast."""

from ssiuu_fast import ops
from ssiuu_fast.attribution import Attribution, attribute
from ssiuu_fast.influence import influence_variation
from ssiuu_fast.ops import answer_token_counts, sequence_log_probs
from ssiuu_fast.regularizer import SSIUURegularizer
from ssiuu_fast.regularizer_file import load_regularizer, save_regularizer

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "SSIUURegularizer",
    "answer_token_counts",
    "attribute",
    "influence_variation",
    "load_regularizer",
    "ops",
    "save_regularizer",
    "sequence_log_probs",
]
