"""The penalty at the grain of neurons: every output of a linear module is a feature with an attribution of its own."""

# One step:
#   1. the forward pass runs through a tap at every module, which keeps its output h           (taps.py)
#   2. backward(log_probs) sends ∂T/∂h to the taps, and A = Σ h·g is compared with A^ref       (neuron_measurement.py)
#      of a whole batch A is a sum over ranks too, and is compared when that is whole          (neuron_step.py)
#   3. A becomes the reference of the next step, or stays a sample's first                     (neuron_references.py)
#   4. each tap gets what it is to add: 2λ · 1[A<0] · (A − A^ref) · g, in place of h
#   5. loss.backward() adds it on its way; while λ is being calibrated a pass of zeros does, and its norm is taken

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.frozen import refuse_reentrant
from ssiuu_fast.neuron_measurement import Measurement
from ssiuu_fast.neuron_ranks import ranks_of_step
from ssiuu_fast.neuron_references import BatchReferences, Form, SampleReferences, gather_samples
from ssiuu_fast.neuron_step import NeuronStep
from ssiuu_fast.ops.backends import choose
from ssiuu_fast.references import required
from ssiuu_fast.selection import base_layer, select_modules
from ssiuu_fast.step import MicroBatch
from ssiuu_fast.taps import PendingInjections, Taps
from ssiuu_fast.warn import warn_user


class NeuronGrain:
    """The tapped modules and what the attributions of their neurons are compared with (METHOD, open point 3).

    With h[b,k,i] a module's output and g = ∂T/∂h, A[i] = Σ_b Σ_k h·g for reference="previous" and A[b,i] = Σ_k h·g for
    "initial". λ · 2 · 1[A < 0] · (A − A^ref) · g is added to the gradient at h in the loss's own backward pass, and
    flows from there to every parameter below.

    Over several ranks the loop's gradient is the mean over ranks (DDP, FSDP2) and the penalty's is that of the whole
    batch, a sum: each rank adds its own part as many times as there are ranks.
    """

    # each batch, or sample, is compared with its own first attribution
    starts_at_its_reference = True
    # ‖∂R/∂φ‖ is measured while λ is being calibrated, and not after
    knows_share = False

    def __init__(
        self,
        model: nn.Module,
        patterns: Iterable[str] | None,
        *,
        reference: str,
        one_sided: bool,
        backend: str,
        calibrated: bool,
        process_group,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError("granularity='neuron' taps the outputs of modules: give the model, not its parameters")
        engines.refuse_compiled(model, ", or use granularity='parameter'")
        model, ddp = engines.strip(model)
        refuse_reentrant(model)
        engines.refuse_partitioned(model.named_parameters())
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise ValueError("no parameter of the model requires grad: unfreeze what is to be trained")
        engines.refuse_steps_in_backward(self._trainable.items())
        self._modules = select_modules(model, patterns)
        self._group = ranks_of_step(model, ddp, self._modules, process_group, calibrated=calibrated)
        self.ranks = self._group.ranks
        self.shards = self._group.shards
        self.agreement = self._group.agreement
        for module in self._modules.values():
            # asked for by name, a backend that can't run is refused now and not in the first step
            weight = base_layer(module).weight
            choose(backend, "neuron_penalty", weight.device, double=weight.dtype == torch.float64)
        self._how = {"ranks": self.ranks, "one_sided": one_sided, "backend": backend}
        self._references = SampleReferences() if reference == "initial" else BatchReferences()
        self._taps = Taps(self._modules)
        # one a micro-batch of the last step, whose losses may be sent back together
        self._pending: list[PendingInjections] = []
        self._warned: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._trainable)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._trainable.values())

    @property
    def modules(self) -> list[str]:
        return list(self._modules)

    def sample_numbers(self, samples: int, sample_ids: Tensor | None, last: bool) -> list[int] | None:
        """The sample ids as numbers, None where they are of no use.

        Raises ValueError where this grain can't take the micro-batch.
        """
        if isinstance(self._references, BatchReferences):
            if not last:
                raise ValueError(
                    "last=False: with granularity='neuron' and reference='previous' an attribution is a sum over the "
                    "whole batch, and this micro-batch would be sent back before that sum is known. Give the step as "
                    "one micro-batch, or use reference='initial'"
                )
            return None
        return _numbers(sample_ids, samples)

    def begin(self, scale: float, weight: float | None) -> "NeuronStep":
        """A new step; the factor on the caller's loss, and λ (None while it is being calibrated) hold for all of it."""
        self.settle()
        if weight is None:
            # ∂R/∂φ is about to be measured at each of them
            engines.refuse_frozen(self._trainable.items())
        return NeuronStep(self, scale, weight)

    @property
    def compares_samples(self) -> bool:
        """Whether each sample is compared with itself; else the whole batch, over all ranks, with another."""
        return isinstance(self._references, SampleReferences)

    def measure(self, batch: MicroBatch, scale: float, weight: float) -> Measurement:
        """The attributions of a micro-batch; of this rank's part of one, where they are sums over ranks."""
        unknown = self._unknown(batch)
        self._group.begin_pass(self._taps, batch.target, len(self._modules))
        measured = Measurement(self._references, **self._how)
        measured.run(self._taps, batch, self.modules, weight=weight, scale=scale)
        if unknown:
            self._warn_once(
                "reference",
                "reference='initial' without set_reference(): the attributions of each sample's first step are kept",
            )
        return measured

    def inject(self, measured: Measurement) -> None:
        """Hands the taps what the loss's pass is to add."""
        self._pending.append(measured.inject())

    def store(self, attributions: dict[str, Tensor], samples: int, sample_ids: list[int] | None) -> None:
        """Takes up attributions, of all ranks where they are of the whole batch."""
        self._references.store(attributions, samples, sample_ids)

    def lacking(self, sample_ids: list[int]) -> list[int]:
        """Places of the samples whose references aren't known to all ranks yet."""
        return self._references.lacking(sample_ids)

    def store_over_ranks(self, shares: list[tuple[list[int], list[str]]], attributions: dict[str, Tensor]) -> None:
        """Takes up what every rank first saw; shares: ids and modules, by rank; attributions: of this rank."""
        if any(ids for ids, _ in shares):
            # in one process the module would be in the graph of the whole batch, and no path from these samples to it
            ids, gathered = gather_samples(shares, attributions, self.forms, self.ranks, absent=0.0)
            self._references.store(gathered, len(ids), ids)
            self._references.note_incomplete(ids, len(self._modules))

    def measure_injected(self, target: Tensor, visit: Callable[[int, Tensor], None]) -> None:
        """Runs visit(index, gradient) on what the last micro-batch's penalty comes to at each parameter.

        Nothing of it is left for the loss's own pass.
        """
        self._taps.visit_gradients(target, self.parameters, visit)
        # what lies below every parameter was not reached
        self._pending.pop().abandon()

    def settle(self) -> None:
        """Judges the last step, whose losses were sent back by now: warns if a penalty was never added."""
        lost = max((pending.count for pending in self._pending), default=0)
        if lost:
            self._warn_once(
                "lost",
                f"at {lost} modules the penalty of the last backward() was never added: with granularity='neuron' "
                "it travels with the loss, which must come from the same forward pass as log_probs and be sent back "
                "after regularizer.backward(log_probs). Of a step that is not to be taken, say so by abandon_step()",
            )
        self._pending = []

    def abandon(self) -> None:
        """The last step's losses won't be sent back, or shall add nothing if they are."""
        for pending in self._pending:
            pending.abandon()
        self._pending = []

    def set_reference(self, batches: Iterable[MicroBatch]) -> None:
        """A_ref[b,i] of every sample, by its id; each batch's graph is freed after use.

        Each rank brings its share of the samples, and gets those of all of them.
        """
        references = SampleReferences.from_pass(self._measure_references(batches))
        self._group.end_passes()
        self._references = references.over_ranks(self.ranks, self.forms)

    def _measure_references(self, batches: Iterable[MicroBatch]) -> list[tuple[list[int], dict[str, Tensor]]]:
        seen: set[int] = set()
        found = []
        for batch in batches:
            for number in batch.sample_ids:
                if number in seen:
                    raise ValueError(f"set_reference was given sample id {number} twice: each sample has its own")
                seen.add(number)
            self._group.begin_pass(self._taps, batch.target, len(self._modules))
            measured = Measurement(SampleReferences(), **self._how)
            measured.run(self._taps, batch, self.modules, weight=0.0, retain_graph=False)
            for name, attribution in measured.attributions.items():
                if attribution.isnan().any():
                    raise FloatingPointError(
                        f"the reference attribution of {name} is not finite: are the starting weights sound?"
                    )
            found.append((batch.sample_ids, measured.attributions))
        return found

    def loop_divides_by(self) -> float:
        """What the loop divides a sum of gradients over the ranks by."""
        return self._group.loop_divides_by()

    def state_dict(self) -> dict:
        return {"neurons": self._neurons(), **self._references.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        saved, ours = required(state, "neurons"), self._neurons()
        if saved != ours:
            name = min(name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name))
            raise ValueError(
                f"the saved state is of other modules: {name} has {saved.get(name, 'no')} neurons there, "
                f"{ours.get(name, 'no')} here"
            )
        self._references = type(self._references).from_state(state, self.forms)
        self.abandon()

    @property
    def forms(self) -> dict[str, Form]:
        """What the attributions of each tapped module are."""
        weights = {name: base_layer(module).weight for name, module in self._modules.items()}
        neurons = self._neurons()
        return {
            name: Form(neurons[name], torch.promote_types(weight.dtype, torch.float32), weight.device)
            for name, weight in weights.items()
        }

    def _neurons(self) -> dict[str, int]:
        layers = {name: base_layer(module) for name, module in self._modules.items()}
        # GPT-2's Conv1D has another name for its width
        return {name: layer.nf if hasattr(layer, "nf") else layer.out_features for name, layer in layers.items()}

    def _unknown(self, batch: MicroBatch) -> list[int]:
        """Ids without an initial attribution; ValueError where every sample should have one."""
        if isinstance(self._references, BatchReferences):
            return []
        unknown = [number for number in batch.sample_ids if number not in self._references.rows]
        if unknown and self._references.complete:
            raise ValueError(
                f"sample id {unknown[0]} was not in the pass of set_reference(), so it has no initial attribution: "
                "give set_reference every forget sample, under the ids that backward is given"
            )
        return unknown

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn_user(message)


def _numbers(sample_ids: Tensor | None, samples: int) -> list[int]:
    if sample_ids is None:
        raise ValueError(
            "granularity='neuron' with reference='initial' compares each sample with itself: give sample_ids, a whole "
            "number a sample (its row in the forget set)"
        )
    whole = isinstance(sample_ids, Tensor) and not (
        sample_ids.is_floating_point() or sample_ids.is_complex() or sample_ids.dtype == torch.bool
    )
    if not whole or sample_ids.shape != (samples,):
        found = f"{sample_ids.dtype} {list(sample_ids.shape)}" if isinstance(sample_ids, Tensor) else repr(sample_ids)
        raise ValueError(f"sample_ids must be a tensor of {samples} whole numbers, shape [{samples}], got {found}")
    return sample_ids.tolist()
