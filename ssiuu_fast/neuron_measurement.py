"""One backward pass from the target to the tapped outputs: attributions of neurons, and what is to be injected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssiuu_fast import engines
from ssiuu_fast.neuron_references import BatchReferences, SampleReferences
from ssiuu_fast.ops.neuron_penalty import neuron_penalty
from ssiuu_fast.step import MicroBatch
from ssiuu_fast.taps import PendingInjections, TappedOutput, Taps


class Measurement:
    """What a pass found, by module. It changes nothing: the references are only read, nothing is injected yet.

    attributions: [neurons], or [samples, neurons] for references by sample; NaN where one isn't finite.
    """

    def __init__(self, references: BatchReferences | SampleReferences, *, one_sided: bool, backend: str):
        self.attributions: dict[str, Tensor] = {}
        self.nonfinite: dict[str, Tensor] = {}
        self._penalties: list[Tensor] = []
        self._injections: list[tuple[TappedOutput, Tensor]] = []
        self._references = references
        self._per_sample = isinstance(references, SampleReferences)
        self._one_sided = one_sided
        self._backend = backend

    def run(
        self,
        taps: Taps,
        batch: MicroBatch,
        modules: Sequence[str],
        *,
        weight: float,
        scale: float = 1.0,
        retain_graph: bool = True,
    ) -> None:
        """weight: λ of the injections; with 0 there are none."""
        reference_of = self._references.for_batch(batch.sample_ids)

        def see(output: TappedOutput, hidden: Tensor, gradient: Tensor) -> None:
            self._refuse(output.name, hidden, batch)
            self._compare(output, hidden, gradient, reference_of(output.name, hidden), weight, scale)

        taps.measure(batch.target, see, scale=scale, retain_graph=retain_graph)
        found = len(self.attributions)
        engines.refuse_missing(batch.target, found, len(modules), "tapped modules", "wrapped, copied or compiled")

    def penalty(self) -> Tensor:
        """R over all modules, float64."""
        return _total(self._penalties)

    def negative(self) -> Tensor:
        """Attributions under 0, those not yet compared with anything included."""
        return _total([(attribution < 0).sum() for attribution in self.attributions.values()])

    def elements(self) -> int:
        return sum(attribution.numel() for attribution in self.attributions.values())

    def inject(self) -> PendingInjections:
        """Hands every output what the next backward pass through it is to add."""
        pending = PendingInjections()
        for output, injection in self._injections:
            output.inject(injection, pending)
        self._injections = []
        return pending

    def _refuse(self, name: str, hidden: Tensor, batch: MicroBatch) -> None:
        if name in self.attributions:
            raise ValueError(
                f"{name} is used twice in this graph: its neurons have two outputs at a token. Give log_probs of one "
                "forward pass, and leave a module that one pass uses twice out with parameters=[...]"
            )
        shape = list(hidden.shape)
        if len(shape) != 3:
            raise ValueError(
                f"{name} puts out {shape}: attributions are summed over the tokens of a sample, which takes outputs of "
                "[batch, tokens, neurons]. Leave it out with parameters=[...]"
            )
        if self._per_sample and shape[0] != batch.samples:
            raise ValueError(
                f"{name} puts out {shape} for {batch.samples} samples: with reference='initial' the first dimension "
                "must be the sample. Leave it out with parameters=[...]"
            )

    def _compare(self, output: TappedOutput, hidden: Tensor, gradient: Tensor, reference, weight, scale) -> None:
        """gradient: scale · ∂T/∂h; the injection is scale · weight · 2 · d · g."""
        # one rank's sums end here: over several, A is to be reduced between the sum and the injection
        result = neuron_penalty(
            hidden if hidden.stride(-1) == 1 else hidden.contiguous(),
            # a copy: the pass goes on below with the gradient itself, and a residual stream may hold it too
            gradient.detach().clone(memory_format=torch.contiguous_format),
            None if reference is None else reference * scale,
            # d and g both come scale times too large
            weight=weight / scale,
            per_sample=self._per_sample,
            one_sided=self._one_sided,
            backend=self._backend,
        )
        attribution = result.attribution / scale
        left_out = ~attribution.isfinite()
        if reference is not None:
            left_out |= (attribution < 0) & (attribution - reference).isinf()
        self.attributions[output.name] = attribution.masked_fill_(left_out, torch.nan)
        self.nonfinite[output.name] = left_out.sum()
        self._penalties.append(result.penalty / scale**2)
        if weight and reference is not None:
            self._injections.append((output, result.injection))


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
