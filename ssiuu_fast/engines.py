"""How the gradient of the target is had from a model, however it is wrapped; what can't be had is refused by name."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ssiuu_fast.shards import is_sharded

FREED_GRAPH = "Trying to backward through the graph a second time"
REENTRANT = "use_reentrant=True"
DONATED_BUFFERS = "donated buffers"
REENTRANT_REMEDY = (
    "reentrant gradient checkpointing can't give the gradient of the target, and on frozen embeddings (LoRA) may train "
    "nothing: use "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)


# what of neurons is sought in a graph, and why it may be missing
TAPPED = ("tapped modules", "wrapped, copied or compiled")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module, for what works in one process only.

    Raises ValueError for wrappers that hide the gradient of the target, for several processes and sharded parameters.
    """
    model, ddp = strip(model)
    if ddp is not None:
        refuse_several_processes(ddp.process_group)
    refuse_partitioned(model.named_parameters())
    refuse_sharded(model.named_parameters(), "this works on whole ones. Run in one process")
    return model


def bare(model: nn.Module) -> nn.Module:
    """The user's own module under torch.compile and DistributedDataParallel, for what works under both."""
    return _unwrapped(model)[0]


def strip(model: nn.Module) -> tuple[nn.Module, nn.parallel.DistributedDataParallel | None]:
    """The user's own module under torch.compile and DistributedDataParallel, and the latter.

    Raises ValueError for wrappers in which the gradient of the target, or its sum over ranks, can't be had.
    """
    model, ddp = _unwrapped(model)
    for name, module in model.named_modules():
        _refuse_module(name or "the model", module)
    if ddp is not None and ddp.static_graph:
        raise ValueError(
            "the model is in DistributedDataParallel(static_graph=True), which takes the first backward pass through "
            "its graph for the loss's: leave static_graph out, or use find_unused_parameters=True"
        )
    keep_unpacked(model)
    return model, ddp


def _unwrapped(model: nn.Module) -> tuple[nn.Module, nn.parallel.DistributedDataParallel | None]:
    ddp = None
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            ddp = model
            model = model.module
        else:
            return model, ddp


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing weights in 4 bits for inference, which it does in the first evaluation on a CPU
    with AVX-512 BF16: gradients that pass through packed weights are silently wrong (bitsandbytes 0.50).

    Raises ValueError where they are packed already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: bitsandbytes packed these 4-bit weights in an evaluation on the CPU, and gradients through "
                "packed weights are wrong: load the model again, and build this before the first evaluation"
            )
        module.support_avx512bf16_for_cpu = False


def refuse_compiled(model: nn.Module, otherwise: str = "") -> None:
    """otherwise: what else the caller may do, as the end of the message."""
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or 'the model'} is compiled: taps are forward hooks on its linear modules, which a compiled "
                f"graph leaves out or breaks at. Give the model before torch.compile{otherwise}"
            )


def refuse_several_processes(process_group=None) -> None:
    """None is the default group, where one is initialised."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size(process_group)
    if world > 1:
        raise ValueError(f"the process group has {world} ranks: this works in one process only")


def refuse_partitioned(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in named_parameters:
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, which is not supported: use DDP, FSDP2 or one process"
            )


def refuse_sharded(named_parameters: Iterable[tuple[str, nn.Parameter]], remedy: str) -> None:
    for name, parameter in named_parameters:
        if is_sharded(parameter):
            raise ValueError(f"{name} is a DTensor (FSDP2 or tensor parallel): {remedy}")


def refuse_steps_in_backward(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in named_parameters:
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook that runs as soon as its gradient is there: optimizers that step inside backward "
                "(lomo, adalomo, *_layerwise) would move the weights before the step's gradient is whole"
            )


def refuse_frozen(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """RuntimeError for a parameter that was given up since it was selected."""
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            raise RuntimeError(f"{name} was frozen after the regulariser was built: build it after freezing")


def _refuse_module(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    origins = {type(module).__module__.split(".")[0], getattr(module.forward, "__module__", "").split(".")[0]}
    if isinstance(module, nn.DataParallel):
        raise ValueError(
            f"{name} is a DataParallel, whose replicas hide the parameters from autograd: use one process a GPU"
        )
    if kind == "FullyShardedDataParallel":
        raise ValueError(
            f"{name} is sharded by FSDP1, whose flat parameters can't be regularised one by one: use FSDP2"
        )
    if kind == "DeepSpeedEngine":
        raise ValueError(f"{name} is a DeepSpeedEngine, which owns the backward pass: it is not supported")
    for origin in origins & {"liger_kernel", "unsloth", "unsloth_zoo"}:
        raise ValueError(
            f"{name} ({kind}) comes from {origin}, which overwrites outputs and saved tensors in place: what a tap "
            "sees, and a second backward over one graph, would be silently wrong. Load the model without it"
        )


def target_gradients(
    target: Tensor, parameters: list[nn.Parameter], *, scale: float = 1.0, retain_graph: bool = True
) -> list[Tensor | None]:
    """scale · ∂target/∂φ for each parameter, None where it isn't in the graph. No `.grad` is touched.

    Every gradient is contiguous and shares memory with no other, so that it may be overwritten.
    """
    gradients = differentiate(target, parameters, scale=scale, retain_graph=retain_graph)
    found = sum(gradient is not None for gradient in gradients)
    refuse_missing(target, found, len(parameters), "regularised parameters", "wrapped, sharded or frozen")
    return _separate(gradients)


# passes of this package that are under way, in whichever thread autograd runs their hooks
_measuring_passes = 0


@contextmanager
def measuring() -> Iterator[None]:
    """Around a backward pass that only looks at a graph; what autograd complains of gets a remedy."""
    global _measuring_passes
    _measuring_passes += 1
    try:
        with explained():
            yield
    finally:
        _measuring_passes -= 1


@contextmanager
def explained() -> Iterator[None]:
    """Around a backward pass; what autograd complains of gets a remedy."""
    try:
        yield
    except RuntimeError as error:
        remedy = _remedy(str(error))
        if remedy is None:
            raise
        raise RuntimeError(remedy) from error


def is_measuring() -> bool:
    """Whether the backward pass that is under way only looks at a graph, for this package."""
    return _measuring_passes > 0


def differentiate(
    target: Tensor, tensors: list[Tensor], *, scale: float = 1.0, retain_graph: bool = True
) -> tuple[Tensor | None, ...]:
    """scale · ∂target/∂tensor for each, None where it isn't in the graph."""
    with measuring():
        return torch.autograd.grad(
            target,
            tensors,
            grad_outputs=torch.full_like(target, scale),
            retain_graph=retain_graph,
            allow_unused=True,
        )


def visit_gradients(target: Tensor, parameters: list[nn.Parameter], visit: Callable[[int, Tensor], None]) -> None:
    """Runs visit(index, gradient) on what reaches each parameter in a backward pass of zeros from target.

    That is what hooks in the graph add to it. The gradients exist one at a time, no `.grad` is touched and the graph is
    kept.
    """

    def replace(index: int, gradient: Tensor) -> Tensor:
        visit(index, gradient)
        # autograd.grad collects what this returns: something without memory
        return gradient.new_zeros(()).expand(gradient.shape)

    handles = [parameter.register_hook(partial(replace, index)) for index, parameter in enumerate(parameters)]
    try:
        differentiate(target, parameters, scale=0.0)
    finally:
        for handle in handles:
            handle.remove()


def refuse_missing(target: Tensor, found: int, total: int, sought: str, usual_reasons: str) -> None:
    """Raises RuntimeError where nothing that was sought is in the graph, or where checkpointing may hide some of it."""
    if found < total and _has_node(target, "CheckpointFunctionBackward"):
        raise RuntimeError(REENTRANT_REMEDY)
    if not found:
        raise RuntimeError(
            f"0 of {total} {sought} are in this graph: was the model {usual_reasons} after the regulariser was built? "
            "Or are blocks checkpointed with use_reentrant=True on frozen embeddings (LoRA)? Then use_reentrant=False"
        )


def _separate(gradients: Iterable[Tensor | None]) -> list[Tensor | None]:
    # autograd may hand one tensor to two parameters (a + b), or an expanded one (sum)
    seen: set[int] = set()
    separate = []
    for gradient in gradients:
        if gradient is not None:
            if gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            gradient = gradient.contiguous()
            if gradient.untyped_storage().data_ptr() in seen:
                gradient = gradient.clone()
            seen.add(gradient.untyped_storage().data_ptr())
        separate.append(gradient)
    return separate


def _remedy(message: str) -> str | None:
    if FREED_GRAPH in message:
        return (
            "the graph of log_probs was already freed: call regularizer.backward(log_probs) before loss.backward() "
            "of the same micro-batch, in every step"
        )
    if REENTRANT in message or "incompatible with .grad()" in message:
        return REENTRANT_REMEDY
    if DONATED_BUFFERS in message:
        return (
            "torch.compile donated the buffers of this graph to its first backward: set "
            "torch._functorch.config.donated_buffer = False before the first compiled backward"
        )
    return None


def leaves(tensor: Tensor) -> set[int]:
    """The ids of the tensors that are leaves of the graph."""
    return {id(node.variable) for node in nodes([tensor.grad_fn]) if hasattr(node, "variable")}


def has_leaf(tensor: Tensor, sought: set[int]) -> bool:
    """Whether one of the tensors with these ids is a leaf of the graph."""
    return any(id(getattr(node, "variable", None)) in sought for node in nodes([tensor.grad_fn]))


def _has_node(tensor: Tensor, name: str) -> bool:
    return any(node.name() == name for node in nodes([tensor.grad_fn]))


def nodes(start: Iterable, ends: Callable[[object], bool] = lambda node: False) -> Iterator:
    """Every node of the graph that is reached from these, what was reached last first.

    ends: whether none is to be reached by way of a node.
    """
    seen, waiting = {None}, list(start)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        yield node
        seen.add(node)
        if not ends(node):
            waiting += [following for following, _ in node.next_functions]
