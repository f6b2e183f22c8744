"""How much attributions change from step to step, and whether a reference of few bits can tell."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssiuu_fast.host_copy import HostCopy
from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.warn import warn_user

# relative error of a stored attribution (FACTS: measured on products g · φ)
STATE_ERRORS = {torch.bfloat16: 0.002, Blockwise8: 0.013}
# the penalty's gradient is then off by about a tenth
ENOUGH = 10
STEPS_WATCHED = 10
STEPS_TOO_LITTLE = 3
# tensors and elements looked at in a step: spread over all, and little enough to cost nothing
TENSORS = 32
ELEMENTS = 4096


class ChangeWatch:
    """Measures the median |A − A_ref| / |A| of a step, and warns once if the references' rounding hides it."""

    def __init__(self):
        self._seen = 0
        self._too_little = 0
        self._unread: tuple[HostCopy, float] | None = None
        self.begin([], {})

    def begin(self, names: Sequence[str], kinds: dict[str, torch.dtype | type]) -> None:
        """A step in which the parameters of these names have a gradient. kinds: see References."""
        self.look()
        # 0 where there are bits enough
        errors = {name: STATE_ERRORS.get(kinds[name], 0.0) for name in names}
        self._chosen = set(_spread([name for name in names if errors[name]], TENSORS))
        self._error = max((errors[name] for name in self._chosen), default=0.0)
        self._samples: list[Tensor] = []

    @torch.no_grad()
    def see(
        self,
        name: str,
        gradient: Tensor,
        parameter: Tensor,
        reference: Tensor | Blockwise8,
        gradient_scale: float,
    ) -> None:
        """Looks at a few elements, before the pass overwrites g."""
        if name in self._chosen:
            each = max(1, ELEMENTS // len(self._chosen))
            self._samples.append(_changes(gradient, parameter, reference, gradient_scale, each))

    @torch.no_grad()
    def finish(self, shards: Ranks) -> Tensor | None:
        """The median over a few thousand elements spread over all tensors.

        shards: the ranks over which they are spread, who look at their own. A one-element tensor on the device, NaN
        where every A is 0; None where the references have more than 16 bits.
        """
        if not self._samples or (shards.size == 1 and not any(sample.numel() for sample in self._samples)):
            return None
        device = self._samples[0].device
        median = _median(_of_all(torch.cat([sample.to(device) for sample in self._samples]), shards))
        self._samples = []
        self._unread = (HostCopy(median), self._error)
        if device.type == "cpu":
            self.look()
        return median

    def look(self) -> None:
        """Takes in what the last step measured; on a GPU it has arrived long since."""
        if self._unread is None:
            return
        (copy, error), self._unread = self._unread, None
        if self._seen == STEPS_WATCHED:
            return
        (change,) = copy.read()
        self._seen += math.isfinite(change)
        self._too_little += change < ENOUGH * error
        if self._too_little == STEPS_TOO_LITTLE:
            self._seen = STEPS_WATCHED
            warn_user(
                f"attributions change by {change:.1%} of themselves from reference to step, and a stored one is off by "
                f"{error:.1%}: the penalty compares rounding errors. Use state_dtype=torch.float32 (float32 on the "
                "command line)"
            )


def _spread(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    # steps that are no whole number, so that it isn't always the same module of a block
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _changes(gradient, parameter, reference, gradient_scale, most):
    stride = max(1, gradient.numel() // most)
    # an odd stride walks over the columns too
    stride -= stride % 2 == 0
    gradient, parameter = (tensor.detach().view(-1)[::stride].float() for tensor in (gradient, parameter))
    attribution = parameter * (gradient * gradient_scale)
    stored = reference.decode_strided(stride) if isinstance(reference, Blockwise8) else reference.view(-1)[::stride]
    return (attribution - stored).abs() / attribution.abs()


def _of_all(changes: Tensor, shards: Ranks) -> Tensor:
    """What all ranks looked at, with NaN between, which doesn't count."""
    if shards.size == 1:
        return changes
    # a rank may have looked at up to three times as many as asked for
    padded = torch.nn.functional.pad(changes[: 3 * ELEMENTS], (0, max(0, 3 * ELEMENTS - len(changes))), value=math.nan)
    return shards.concatenated(padded)


def _median(changes: Tensor) -> Tensor:
    """The lower median, shape (1,); 0/0 doesn't count. Without asking the device how many do count."""
    ordered = changes.sort().values
    middle = (changes.isnan().logical_not().sum() - 1).clamp(min=0) // 2
    return ordered.gather(0, middle.reshape(1))
