"""What a person calls a method: an objective, with or without the penalty."""

from dataclasses import dataclass

from ssiuu_fast.objectives import OBJECTIVES

PENALTY = "ssiuu"
# the paper's backbone
BACKBONE = "gd"


@dataclass(frozen=True)
class Method:
    name: str
    objective: str
    penalised: bool


def method(name: str) -> Method:
    """An objective by name ("npo"), with the penalty on top ("npo+ssiuu"), or "ssiuu", which is gd+ssiuu.

    Raises ValueError for an unknown one.
    """
    objective, plus, penalty = (f"{BACKBONE}+{PENALTY}" if name == PENALTY else name).partition("+")
    if objective not in OBJECTIVES or (plus and penalty != PENALTY):
        raise ValueError(
            f"unknown method {name!r}; known: {PENALTY}, {', '.join(OBJECTIVES)}, and each with +{PENALTY}, "
            f"the penalty on top"
        )
    return Method(name, objective, bool(plus))
