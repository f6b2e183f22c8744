"""The penalty at the grain of parameters: every scalar of a weight is a feature with an attribution of its own."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssiuu_fast import engines
from ssiuu_fast.change import ChangeWatch
from ssiuu_fast.frozen import refuse_reentrant
from ssiuu_fast.host_references import HostReferences
from ssiuu_fast.ops.backends import choose
from ssiuu_fast.parameter_step import ParameterStep
from ssiuu_fast.penalty_pass import PenaltyPass
from ssiuu_fast.references import (
    MeanAttribution,
    References,
    StateDtype,
    fill_from_flat_state,
    flat_state,
    refuse_state_dtype,
    required,
)
from ssiuu_fast.replicated import Replicated
from ssiuu_fast.selection import NamedParameters, select_parameters
from ssiuu_fast.shards import local_part, sharded_modules
from ssiuu_fast.shared_backward import Plan, SharedBackward
from ssiuu_fast.step import Gradients, MicroBatch
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
        offload: bool,
        backend: str,
        process_group,
    ):
        model, self._parameters, self._engine = _engine(model_or_named_parameters, patterns, process_group)
        self.agreement = self._engine.agreement
        self.shards = self._engine.shards
        _refuse_unusual(self._parameters)
        refuse_state_dtype(state_dtype, self._parameters)
        if offload and self._engine.places() is not None:
            raise ValueError(
                "offload=True keeps whole references in host memory, and those of this model are sharded as "
                "fully_shard did it: leave offload out; state_dtype='8bit' makes shards small too"
            )
        for parameter in self._parameters.values():
            # asked for by name, a backend that can't run is refused now and not in the first step
            choose(backend, "penalty_", parameter.device, double=parameter.dtype == torch.float64)
        self._reference = reference
        self._one_sided = one_sided
        self._state_dtype = state_dtype
        self._kept_as = HostReferences if offload else References
        self._backend = backend
        self.names = list(self._parameters)
        self.elements = sum(parameter.numel() for parameter in self._parameters.values())
        self._references: References | None = None
        self._change = ChangeWatch()
        self._obstacle = _obstacle(model, self._engine)
        self._one_pass = None if self._obstacle else SharedBackward(model, self._parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    def sample_numbers(self, samples: int, sample_ids: Tensor | None, last: bool) -> None:
        """Any micro-batch will do, and samples need no names."""

    def begin(self, scale: float, weight: float | None) -> ParameterStep:
        """A new step; the factor on the caller's loss, and λ (None while it is being calibrated) hold for all of it."""
        return ParameterStep(self, scale, weight)

    def settle(self) -> None:
        """The last step is over; its penalty was added at once, so there is nothing to judge."""

    def abandon(self) -> None:
        """Nothing of a step is left to be added."""

    @property
    def engine(self) -> "Replicated | Sharded":
        """How the gradient of the target is had, and completed over the ranks."""
        return self._engine

    @property
    def one_pass(self) -> SharedBackward | None:
        """What gives g from the loss's own backward pass; None where nothing can, whatever the graph."""
        return self._one_pass

    def plan(self, batch: MicroBatch, scale: float) -> Plan:
        """How g of a micro-batch is had from the loss's own pass, the same on every rank; or why not."""
        engines.refuse_frozen(self._parameters.items())
        if self._one_pass is None:
            plan = Plan(self._obstacle)
        else:
            plan = self._one_pass.plan(batch.target, batch.loss, scale)
        self._engine.agree(batch, plan)
        return plan

    def step_gradients(self, batch: MicroBatch, scale: float) -> tuple[Gradients, int]:
        """scale · ∂T/∂φ of a micro-batch, None for parameters outside its graph, and its number of samples."""
        engines.refuse_frozen(self._parameters.items())
        return self._engine.step_gradients(batch, scale)

    def begin_pass(self, samples: int, scale: float, weight: float | None) -> PenaltyPass:
        """The pass over a step of so many samples; `end_pass` takes up the references that it renewed."""
        first = self._references is None
        references = self._references or self._empty_references(samples)
        if first and self._reference == "initial":
            warn_user(
                "reference='initial' without set_reference(): the attributions of the first step's batch are kept"
            )
        references.follow(samples)
        return PenaltyPass(
            self._local(),
            references,
            self._change,
            self.shards,
            update=self._reference == "previous" or first,
            first=first,
            one_sided=self._one_sided,
            scale=scale,
            weight=weight,
            backend=self._backend,
        )

    def add_to_grad(self, over: PenaltyPass, gradients: dict[str, Tensor]) -> None:
        """Adds the penalty's gradient to what `.grad` holds; g is overwritten."""
        held = {name: _dense_grad(self._parameters[name]) for name in gradients}
        over.add(gradients, [None if grad is None else local_part(grad) for grad in held.values()])
        for name, gradient in gradients.items():
            if over.adds and held[name] is None:
                self._engine.give(self._parameters[name], gradient)

    def end_pass(self, over: PenaltyPass) -> None:
        self._references = over.references

    def set_reference(self, targets: Iterable[MicroBatch]) -> None:
        """A_ref = φ · (b/n) · Σ_s ∂T_s/∂φ over the targets of all ranks, whose graphs are freed one by one."""
        engines.refuse_frozen(self._parameters.items())
        mean = MeanAttribution(self._local())
        for gradients, samples in self._engine.pass_gradients(targets):
            mean.add(gradients, samples)
        mean.samples = self._engine.complete_pass(list(mean.sums.values()), mean.samples)
        references = self._empty_references(samples=None)
        mean.store(references.tensors)
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
            references = self._empty_references(samples)
            fill_from_flat_state(references.tensors, saved)

        def take_up() -> None:
            self._references = references
            self._change = ChangeWatch()

        return take_up

    def _empty_references(self, samples: int | None) -> References:
        return self._kept_as.empty(self._local(), self._state_dtype, samples)

    def _local(self) -> dict[str, Tensor]:
        """What of each parameter lies on this rank."""
        return dict(zip(self.names, self._engine.local(), strict=True))


def _dense_grad(parameter: nn.Parameter) -> Tensor | None:
    """Its `.grad`, which becomes dense: a sparse embedding's isn't, and can't take a penalty on every row."""
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _engine(
    model_or_named_parameters, patterns: Iterable[str] | None, process_group
) -> tuple[nn.Module | None, NamedParameters, "Replicated | Sharded"]:
    """The bare model if there is one, the selected parameters, and how the gradient of the target is had for them."""
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
        return model, selected, Sharded(model, selected, process_group)
    engines.refuse_sharded(
        selected.items(),
        "tensor parallel is not supported. Where it comes from fully_shard, give the model and not its parameters",
    )
    engines.refuse_steps_in_backward(selected.items())
    return model, selected, Replicated(model, list(selected.values()), process_group, ddp)


def _obstacle(model: nn.Module | None, engine) -> str:
    """Why the loss's own pass can't give g, whatever the graph; empty where it may."""
    if model is None:
        return "the regulariser was given parameters and not their model, whose linear modules it would watch"
    mixing = next((name for name, module in model.named_modules() if isinstance(module, _BatchNorm)), None)
    if mixing is not None:
        return f"{mixing} mixes the samples of a batch"
    if engine.shards.size > 1 or engine.places() is not None:
        return "under FSDP2 a linear module's weight gradient is of shards that lie on other ranks"
    return ""


def _refuse_unusual(parameters: NamedParameters) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}: regularised parameters must be fp32, bf16, fp16 or fp64")
        if not local_part(parameter).is_contiguous():
            raise ValueError(f"{name} is not contiguous: store it contiguously, or leave it out with parameters=[...]")
