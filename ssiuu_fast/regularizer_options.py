"""Options of SSIUURegularizer that make no sense, refused before anything is built."""

import torch

from ssiuu_fast.references import StateDtype
from ssiuu_fast.targets import TARGETS

REFERENCES = ("previous", "initial")


def refuse_options(
    *,
    target: str,
    granularity: str,
    reference: str,
    nonfinite: str,
    state_dtype: StateDtype,
    offload: bool,
    every: int,
    weight: float,
    relative_weight: float | None,
) -> None:
    """ValueError with the value and what it may be."""
    _refuse_unless_one_of("target", target, TARGETS)
    _refuse_unless_one_of("granularity", granularity, ("parameter", "neuron"))
    _refuse_unless_one_of("reference", reference, REFERENCES)
    _refuse_unless_one_of("nonfinite", nonfinite, ("raise", "count"))
    if granularity == "neuron" and state_dtype not in (None, torch.float32):
        raise ValueError(
            f"state_dtype={state_dtype} is of no use with granularity='neuron': a reference is one fp32 number a "
            "neuron (and sample), leave state_dtype out"
        )
    if granularity == "neuron" and offload:
        raise ValueError(
            "offload=True is of no use with granularity='neuron', whose references are one number a neuron (and "
            "sample): leave offload out"
        )
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
    for name, value in (("weight", weight), ("relative_weight", relative_weight)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _refuse_unless_one_of(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
