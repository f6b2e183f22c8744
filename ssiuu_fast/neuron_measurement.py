"""One backward pass from the target to the tapped outputs: attributions of neurons, and what is to be injected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssiuu_fast import engines
from ssiuu_fast.neuron_references import BatchReferences, Form, SampleReferences
from ssiuu_fast.ops.neuron_attribution import neuron_attribution
from ssiuu_fast.ops.neuron_penalty import neuron_penalty, punished_difference
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.step import MicroBatch
from ssiuu_fast.taps import PendingInjections, TappedOutput, Taps


class Measurement:
    """What a pass found, by module. It changes nothing: the references are only read, nothing is injected yet.

    attributions: [neurons], or [samples, neurons] for references by sample; NaN where one isn't finite.

    A sum over the batch is one over its ranks too: where there are several, `run` gives this rank's part, and only
    `sum_over_ranks`, which all ranks call, compares it with anything. A sample lives on one rank.
    """

    def __init__(self, references: BatchReferences | SampleReferences, ranks: Ranks, *, one_sided: bool, backend: str):
        self.attributions: dict[str, Tensor] = {}
        self.nonfinite: dict[str, Tensor] = {}
        self._penalties: list[Tensor] = []
        self._injections: list[tuple[TappedOutput, Tensor]] = []
        # this rank's part of A, and g at every output, which waits for the other parts
        self._parts: dict[str, Tensor] = {}
        self._gradients: dict[str, tuple[TappedOutput, Tensor]] = {}
        self._references = references
        self._ranks = ranks
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
        in_parts = self._ranks.size > 1 and not self._per_sample

        def see(output: TappedOutput, hidden: Tensor, gradient: Tensor) -> None:
            self._refuse(output.name, hidden, batch)
            hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
            # a copy: the pass goes on below with the gradient itself, and a residual stream may hold it too
            gradient = gradient.detach().clone(memory_format=torch.contiguous_format)
            if in_parts:
                self._keep(output, hidden, gradient, scale)
            else:
                self._compare(output, hidden, gradient, reference_of(output.name, hidden), weight, scale)

        taps.measure(batch.target, see, scale=scale, retain_graph=retain_graph)
        found = len(self.found)
        engines.refuse_missing(batch.target, found, len(modules), *engines.TAPPED)

    @property
    def found(self) -> list[str]:
        """The modules in this rank's graph."""
        return list(self._parts or self.attributions)

    def sum_over_ranks(self, forms: dict[str, Form], weight: float) -> None:
        """forms: of the modules that are in the graph of any rank, the same on all of them; weight: as in `run`.

        Does nothing where there is one rank, whose part is the whole.
        """
        if self._ranks.size == 1:
            return
        device = next(iter(self._parts.values())).device
        widths = [form.neurons for form in forms.values()]
        parts = [self._parts.get(name) for name in forms]
        summed = self._ranks.sum_(
            torch.cat(
                [
                    torch.zeros(width, dtype=torch.float64, device=device) if part is None else part.to(device)
                    for part, width in zip(parts, widths, strict=True)
                ]
            )
        )
        reference_of = self._references.for_batch(None)
        for (name, form), attribution in zip(forms.items(), summed.split(widths), strict=True):
            # a tensor of its own: a part of one would be saved with all of its memory
            attribution = attribution.to(form.device, form.dtype, copy=True)
            reference = reference_of(name, attribution)
            d, _ = punished_difference(attribution, reference, self._one_sided)
            left_out = self._record(name, attribution, reference, d.double().square().sum())
            if weight and reference is not None and name in self._gradients:
                output, gradient = self._gradients[name]
                # a neuron that is left out may hold NaN or inf, which 0 times them doesn't undo
                self._injections.append((output, gradient.masked_fill_(left_out, 0).mul_(2 * weight * d)))
        self._parts, self._gradients = {}, {}

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
        if name in self.found:
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
        result = neuron_penalty(
            hidden,
            gradient,
            None if reference is None else reference * scale,
            # d and g both come scale times too large
            weight=weight / scale,
            per_sample=self._per_sample,
            one_sided=self._one_sided,
            backend=self._backend,
        )
        self._record(output.name, result.attribution / scale, reference, result.penalty / scale**2)
        if weight and reference is not None:
            self._injections.append((output, result.injection))

    def _keep(self, output: TappedOutput, hidden: Tensor, gradient: Tensor, scale: float) -> None:
        by_sample = neuron_attribution(hidden, gradient, backend=self._backend).sum
        self._parts[output.name] = by_sample.sum(0, dtype=torch.float64) / scale
        self._gradients[output.name] = (output, gradient)

    def _record(self, name: str, attribution: Tensor, reference: Tensor | None, penalty: Tensor) -> Tensor:
        """Returns which neurons were left out; their attribution becomes NaN."""
        left_out = ~attribution.isfinite()
        if reference is not None:
            left_out |= (attribution < 0) & (attribution - reference).isinf()
        self.attributions[name] = attribution.masked_fill_(left_out, torch.nan)
        self.nonfinite[name] = left_out.sum()
        self._penalties.append(penalty)
        return left_out


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
