"""The penalty's share of the gradient: when it is too small to matter, in plain words."""

import statistics
from collections.abc import Iterable

from torch import nn

from ssiuu_fast.warn import warn_user

# below this mean share the penalty can't matter: 2e-4 changed nothing (METHOD, open point 5)
SMALL_SHARE = 1e-2
# a 16-bit .grad swallows about half of what is added to it at 1e-3 of its norm, nothing at 1e-2
SWALLOWED_SHARE = 4e-3
STEPS_WATCHED = 10


def too_small(share: float, parameters: Iterable[nn.Parameter]) -> str | None:
    """Why a penalty of this share of these parameters' gradient, a mean over the penalised steps, can't matter.

    None where it can.
    """
    if share >= SMALL_SHARE:
        return None
    reason = (
        f"the penalty was {share:.1e} of the gradient on average over the penalised steps: too little to matter, this "
        "run is the objective alone in all but name. Raise weight, or use relative_weight (30 is where to start)"
    )
    if share < SWALLOWED_SHARE and any(parameter.dtype.itemsize == 2 for parameter in parameters):
        reason += ". 16-bit gradients swallow much of a penalty this small: keep weights and gradients in fp32"
    return reason


class ShareWatch:
    """Warns once if the mean share over the first penalised steps is too small."""

    def __init__(self, parameters: list[nn.Parameter]):
        self._parameters = parameters
        self._shares: list[float] = []

    def see(self, share: float) -> None:
        if len(self._shares) == STEPS_WATCHED:
            return
        self._shares.append(share)
        if len(self._shares) == STEPS_WATCHED:
            self.judge(statistics.mean(self._shares))

    def judge(self, share: float) -> None:
        """Warns if this mean share is too small."""
        if reason := too_small(share, self._parameters):
            warn_user(reason)
