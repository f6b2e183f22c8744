"""Operators: one file each, with meaning, checks, a plain torch reference and the choice of a backend."""

from ssiuu_fast.ops import library as library  # registers the operators with torch
from ssiuu_fast.ops.backends import availability
from ssiuu_fast.ops.blockwise8 import Blockwise8
from ssiuu_fast.ops.both_weight_gradients import WeightGradients, both_weight_gradients
from ssiuu_fast.ops.neuron_attribution import NeuronAttribution, neuron_attribution
from ssiuu_fast.ops.neuron_penalty import NeuronPenalty, neuron_penalty
from ssiuu_fast.ops.penalized_weight_gradient import PenalizedWeightGradient, penalized_weight_gradient
from ssiuu_fast.ops.penalty import PenaltyResult, penalty_
from ssiuu_fast.ops.sequence_log_probs import answer_token_counts, sequence_log_probs, sequence_log_probs_from_hidden
from ssiuu_fast.ops.weighted_weight_gradient import weighted_weight_gradient

__all__ = [
    "Blockwise8",
    "NeuronAttribution",
    "NeuronPenalty",
    "PenalizedWeightGradient",
    "PenaltyResult",
    "WeightGradients",
    "answer_token_counts",
    "availability",
    "both_weight_gradients",
    "neuron_attribution",
    "neuron_penalty",
    "penalized_weight_gradient",
    "penalty_",
    "sequence_log_probs",
    "sequence_log_probs_from_hidden",
    "weighted_weight_gradient",
]
