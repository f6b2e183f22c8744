"""Unlearning objectives by name."""

from dataclasses import fields

from ssiuu_fast.objectives.klue import LocalisedDifference
from ssiuu_fast.objectives.log_probs import (
    DirectPreference,
    GradientAscent,
    GradientDifference,
    NegativePreference,
    SimpleNegativePreference,
)
from ssiuu_fast.objectives.objective import Objective
from ssiuu_fast.objectives.rmu import RepresentationMisdirection

OBJECTIVES: dict[str, type[Objective]] = {
    "ga": GradientAscent,
    "gd": GradientDifference,
    "dpo": DirectPreference,
    "npo": NegativePreference,
    "simnpo": SimpleNegativePreference,
    "rmu": RepresentationMisdirection,
    "klue": LocalisedDifference,
}


def make_objective(name: str, **options) -> Objective:
    """The objective of this name; options are the fields of its class.

    Raises ValueError where either is unknown, or an option is out of its range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"objective {name!r} has no option {option!r}; "
                + (f"it has {', '.join(known)}" if known else "it has none")
            )
    return kind(**options)
