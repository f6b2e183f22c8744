"""λ from the gradients of the first steps (METHOD, open point 5)."""

import statistics
from collections.abc import Iterable

from ssiuu_fast.warn import warn_user

CALIBRATION_STEPS = 4
# steps with a penalty and without a ratio, after which it is time to say so
STEPS_IN_VAIN = 10


class Calibration:
    """λ = relative_weight · median of ‖∇L‖ / ‖∂R/∂φ‖ over the first 4 steps with a penalty."""

    def __init__(self, relative_weight: float, ratios: Iterable[float] = ()):
        self.relative_weight = relative_weight
        self.ratios = list(ratios)
        self._in_vain = 0

    def see(self, penalty: float, penalty_norm: float, loss_norm: float) -> None:
        """R and the two norms of one step, at scale 1."""
        if penalty == 0:
            return
        if 0 < penalty_norm < float("inf") and 0 < loss_norm < float("inf"):
            self.ratios.append(loss_norm / penalty_norm)
            return
        self._in_vain += 1
        if self._in_vain == STEPS_IN_VAIN and not self.ratios:
            warn_user(
                f"λ is not calibrated after {STEPS_IN_VAIN} steps with a penalty, and nothing is added: in the last "
                f"one the norm of the loss's gradient was {loss_norm:.3g}, that of the penalty's {penalty_norm:.3g}. "
                "16 bits make 0 or inf of numbers too small or too large for them: keep weights and gradients in fp32 "
                "or bfloat16, change the scale, or give weight in place of relative_weight"
            )

    def weight(self) -> float | None:
        """λ; None while ratios are missing."""
        if len(self.ratios) < CALIBRATION_STEPS:
            return None
        return self.relative_weight * statistics.median(self.ratios)

    def share(self) -> float:
        """Mean ‖λ ∂R/∂φ‖ / ‖∇L‖ that this λ would have had in the steps it is from."""
        return self.weight() * statistics.mean(1 / ratio for ratio in self.ratios)
