"""The penalty at the grain of parameters: every scalar of a weight is a feature with an attribution of its own."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.change import ChangeWatch
from ssiuu_fast.frozen import refuse_reentrant
from ssiuu_fast.ops.backends import choose
from ssiuu_fast.ops.penalty import PenaltyResult, penalty_
from ssiuu_fast.references import (
    MeanAttribution,
    References,
    StateDtype,
    empty_references,
    flat_state,
    from_flat_state,
    refuse_state_dtype,
    required,
)
from ssiuu_fast.replicated import Replicated
from ssiuu_fast.selection import NamedParameters, select_parameters
from ssiuu_fast.shards import local_part, sharded_modules
from ssiuu_fast.step import MicroBatch, StepResult, summed
from ssiuu_fast.warn import warn_user

if TYPE_CHECKING:
    from ssiuu_fast.sharded import Sharded


class ParameterGrain:
    """The regularised parameters and what their attributions are compared with (Algorithm 1)."""

    # the first step is compared with nothing, or with a mean over other samples too
    starts_at_its_reference = False
    # ‖∂R/∂φ‖ comes with every step
    knows_share = True

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        patterns: Iterable[str] | None,
        *,
        reference: str,
        one_sided: bool,
        state_dtype: StateDtype,
        backend: str,
        process_group,
    ):
        self._parameters, self._engine = _engine(model_or_named_parameters, patterns, process_group)
        self.agreement = self._engine.agreement
        self.shards = self._engine.shards
        _refuse_unusual(self._parameters)
        refuse_state_dtype(state_dtype, self._parameters)
        for parameter in self._parameters.values():
            # asked for by name, a backend that can't run is refused now and not in the first step
            choose(backend, "penalty_", parameter.device, double=parameter.dtype == torch.float64)
        self._reference = reference
        self._one_sided = one_sided
        self._state_dtype = state_dtype
        self._backend = backend
        self.elements = sum(parameter.numel() for parameter in self._parameters.values())
        self._references: References | None = None
        self._change = ChangeWatch()

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    def sample_numbers(self, samples: int, sample_ids: Tensor | None, last: bool) -> None:
        """Any micro-batch will do, and samples need no names."""

    def begin(self, scale: float, weight: float | None) -> "ParameterStep":
        """A new step; the factor on the caller's loss, and λ (None while it is being calibrated) hold for all of it."""
        return ParameterStep(self, scale, weight)

    def settle(self) -> None:
        """The last step is over; its penalty was added at once, so there is nothing to judge."""

    def abandon(self) -> None:
        """Nothing of a step is left to be added."""

    def step_gradients(self, batch: MicroBatch, scale: float) -> tuple[list[Tensor | None], int]:
        """scale · ∂T/∂φ of a micro-batch, None for parameters outside its graph, and its number of samples."""
        engines.refuse_frozen(self._parameters.items())
        return self._engine.step_gradients(batch, scale)

    def add_penalty(
        self, gradients: list[Tensor | None], samples: int, scale: float, weight: float | None
    ) -> tuple[PenaltyResult, dict[str, Tensor | None], Tensor, Tensor | None]:
        """Adds the penalty's gradient to `.grad` and updates the references, in one pass over all parameters.

        gradients, samples: what step_gradients gave, summed over the micro-batches; overwritten. Returns this rank's
        sums, the gradients by name, the number of non-finite elements of each parameter in the graph, and what
        ChangeWatch measured.
        """
        gradients, samples = self._engine.complete(gradients, samples)
        gradients = dict(zip(self.names, gradients, strict=True))
        parameters = self._local()
        first = self._references is None
        references = self._references or References(empty_references(parameters, self._state_dtype), samples)
        if first and self._reference == "initial":
            warn_user(
                "reference='initial' without set_reference(): the attributions of the first step's batch are kept"
            )
        references.follow(samples)

        update = self._reference == "previous" or first
        names = [name for name, gradient in gradients.items() if gradient is not None]
        # before the pass, which overwrites the gradients
        change = None
        if not first:
            change = self._change.measure(gradients, parameters, references.tensors, 1.0 / scale, self.shards)
        held = {name: self._parameters[name].grad for name in names}
        counts = torch.zeros(len(names), dtype=torch.int64, device=gradients[names[0]].device)
        result = penalty_(
            [gradients[name] for name in names],
            [parameters[name] for name in names],
            [references.tensors[name] for name in names],
            weight=0.0 if weight is None else weight * scale,
            # while λ is being calibrated the penalty is written over g and dropped
            out=None if weight is None else [None if grad is None else local_part(grad) for grad in held.values()],
            one_sided=self._one_sided,
            update_references=update,
            first=first,
            gradient_scale=1.0 / scale,
            nonfinite_counts=counts,
            backend=self._backend,
        )
        for name, gradient in gradients.items():
            if gradient is None and update:
                # a parameter outside this step's graph has A = 0
                references.tensors[name].zero_()
            elif gradient is not None and weight is not None and held[name] is None:
                self._engine.give(self._parameters[name], gradient)
        self._references = references
        return result, gradients, counts, change

    def set_reference(self, targets: Iterable[MicroBatch]) -> None:
        """A_ref = φ · (b/n) · Σ_s ∂T_s/∂φ over the targets of all ranks, whose graphs are freed one by one."""
        engines.refuse_frozen(self._parameters.items())
        mean = MeanAttribution(self._local(), self._state_dtype)
        for gradients, samples in self._engine.pass_gradients(targets):
            mean.add(gradients, samples)
        mean.samples = self._engine.complete_pass(list(mean.sums.values()), mean.samples)
        references = mean.references()
        # shards of another rank may not be finite
        self.agreement.sums()
        self._references = references

    def places(self) -> dict[str, dict[str, list[int]]] | None:
        """Where this rank's shard of each parameter lies: "shape" of the whole, "first" place in it, "size".

        None where every rank holds the whole.
        """
        places = self._engine.places()
        return None if places is None else dict(zip(self.names, places, strict=True))

    def state_dict(self) -> dict:
        places = self.places()
        return {
            "references": None if self._references is None else flat_state(self._references.tensors),
            "reference_samples": None if self._references is None else self._references.samples,
            **({} if places is None else {"places": places}),
        }

    def prepared(self, state: dict) -> Callable[[], None]:
        """What takes up a saved state, which can't fail any more. ValueError for one that doesn't fit."""
        saved, samples = required(state, "references"), required(state, "reference_samples")
        if state.get("places") != self.places():
            raise ValueError(
                "the saved state is of other shards than this rank's: save and load it by save_regularizer and "
                "load_regularizer, which put shards together"
            )
        references = None
        if saved is not None:
            references = References(from_flat_state(self._local(), self._state_dtype, saved), samples)

        def take_up() -> None:
            self._references = references
            self._change = ChangeWatch()

        return take_up

    def _local(self) -> dict[str, Tensor]:
        """What of each parameter lies on this rank."""
        return dict(zip(self.names, self._engine.local(), strict=True))


class ParameterStep:
    """Sums g over the micro-batches of a step; the penalty is formed when it is whole."""

    def __init__(self, grain: ParameterGrain, scale: float, weight: float | None):
        self.scale = scale
        self._grain = grain
        self._weight = weight
        self._gradients: list[Tensor | None] = []
        self._samples = 0
        self._underflows: list[Tensor] = []

    def add(self, batch: MicroBatch) -> None:
        gradients, samples = self._grain.step_gradients(batch, self.scale)
        self._samples += samples
        self._underflows.append(batch.underflows)
        if not self._gradients:
            self._gradients = gradients
            return
        for index, gradient in enumerate(gradients):
            if self._gradients[index] is None:
                self._gradients[index] = gradient
            elif gradient is not None:
                self._gradients[index].add_(gradient)

    def finish(self) -> StepResult:
        result, gradients, counts, change = self._grain.add_penalty(
            self._gradients, self._samples, self.scale, self._weight
        )
        whole = StepResult(
            penalty=result.penalty,
            negative=result.negative,
            elements=self._grain.elements,
            gradient_square=result.gradient_square,
            underflows=self._underflows,
            names=[name for name, gradient in gradients.items() if gradient is not None],
            nonfinite_counts=counts,
            absent=[name for name, gradient in gradients.items() if gradient is None],
            change=change,
        )
        return summed(whole, self._grain.agreement.ranks, self._grain.shards)


def _engine(
    model_or_named_parameters, patterns: Iterable[str] | None, process_group
) -> tuple[NamedParameters, "Replicated | Sharded"]:
    """The selected parameters, and how the gradient of the target is had for them."""
    ddp, model = None, None
    if isinstance(model_or_named_parameters, nn.Module):
        model, ddp = engines.strip(model_or_named_parameters)
        model_or_named_parameters = model
        refuse_reentrant(model)
        engines.refuse_partitioned(model.named_parameters())
    selected = select_parameters(model_or_named_parameters, patterns)
    engines.refuse_partitioned(selected.items())
    if model is not None and sharded_modules(model):
        from ssiuu_fast.sharded import Sharded

        # all of them get a gradient for a while
        engines.refuse_steps_in_backward(model.named_parameters())
        return selected, Sharded(model, selected, process_group)
    engines.refuse_sharded(
        selected.items(),
        "tensor parallel is not supported. Where it comes from fully_shard, give the model and not its parameters",
    )
    engines.refuse_steps_in_backward(selected.items())
    return selected, Replicated(list(selected.values()), process_group, ddp)


def _refuse_unusual(parameters: NamedParameters) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}: regularised parameters must be fp32, bf16, fp16 or fp64")
        if not local_part(parameter).is_contiguous():
            raise ValueError(f"{name} is not contiguous: store it contiguously, or leave it out with parameters=[...]")
