"""Unlearning that erases instead of hiding: the Ssiuu penalty (arXiv 2509.22263), fast."""

from ssiuu_fast import ops
from ssiuu_fast.attribution import Attribution, attribute
from ssiuu_fast.ops import answer_token_counts, sequence_log_probs
from ssiuu_fast.regularizer import SSIUURegularizer

__version__ = "0.1.0"

__all__ = ["Attribution", "SSIUURegularizer", "answer_token_counts", "attribute", "ops", "sequence_log_probs"]
