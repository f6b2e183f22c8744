"""Which parameters of a model are regularised, or which modules' neurons."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from ssiuu_fast.warn import warn_user

NamedParameters = dict[str, nn.Parameter]

# what PEFT calls the containers of its adapters
_ADAPTERS = re.compile(r"\.(?:lora_\w+|modules_to_save)\.")


def select_parameters(
    model_or_named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]], patterns: Iterable[str] | None
) -> NamedParameters:
    """The parameters to regularise, by name; a tied parameter once.

    patterns None: of a model, the weights of the linear modules inside its blocks that require grad (METHOD, open
    point 6); of named parameters, all that require grad. Otherwise those that require grad and match one of the
    glob patterns. Raises ValueError where nothing is left, or a pattern matches nothing.

    Of a model with adapters of PEFT, None takes A and B of LoRA inside the blocks, whose modules are linear, of every
    adapter that is active; and a linear module of `modules_to_save`, trained as a whole. Not DoRA's magnitudes, IA3's
    factors or LoRA on embeddings: those are no linear module's weights. The frozen base, quantised or not, is left out.
    """
    patterns = _listed(patterns)
    if isinstance(model_or_named_parameters, nn.Module):
        named = dict(model_or_named_parameters.named_parameters())
        candidates = _block_weights(model_or_named_parameters) if patterns is None else named
    else:
        named = candidates = _unique(model_or_named_parameters)
    if patterns is not None:
        candidates = _matching(named, patterns, "parameters")
    selected = {name: parameter for name, parameter in candidates.items() if parameter.requires_grad}
    if not selected:
        raise ValueError(_nothing_selected(named, len(candidates), patterns))
    if patterns is None and isinstance(model_or_named_parameters, nn.Module):
        stacked = [p for p in _stacked_weights(model_or_named_parameters) if named[p].requires_grad]
        _warn_of_stacked(
            stacked, "to regularise them too, choose all by name, parameters=['*_proj.weight', {patterns}]"
        )
    return selected


def select_modules(model: nn.Module, patterns: Iterable[str] | None) -> dict[str, nn.Module]:
    """The linear modules whose outputs are the neurons, by name; whether they are frozen doesn't matter.

    patterns None: those inside the blocks. Otherwise those whose weight's name matches one of the glob patterns. Raises
    ValueError where nothing is left, or a pattern matches nothing.

    A linear module with adapters (LoRA) is one module: its neurons are the outputs of the whole, under its own name.
    """
    patterns = _listed(patterns)
    linear = linear_modules(model)
    if patterns is None:
        selected = {name: module for name, module in linear.items() if _in_block(name)}
    else:
        weights = {f"{name}.weight": module for name, module in linear.items()}
        matching = _matching(weights, patterns, "weights of linear modules")
        selected = {name.removesuffix(".weight"): module for name, module in matching.items()}
    if not selected:
        if not linear:
            raise ValueError(
                "the model has no linear module, whose outputs would be the neurons: use granularity='parameter'"
            )
        raise ValueError(
            f"none of the {len(linear)} linear modules is in a numbered block: choose them by the names of their "
            "weights, parameters=['*weight']"
        )
    if patterns is None:
        remedy = (
            "with granularity='neuron' that is not possible, use granularity='parameter' and parameters=[{patterns}]"
        )
        _warn_of_stacked(_stacked_weights(model), remedy)
    return selected


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All linear modules by name. One with adapters, or with a trained copy of itself (PEFT), is one module."""
    linear: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(outer in linear for outer in _parents(name))
        if is_linear(base_layer(module)) and not inside:
            linear[name] = module
    return linear


def base_layer(module: nn.Module) -> nn.Module:
    """The linear module that adapters were put around, or that is replaced by a trained copy, as PEFT names them; any
    other module is its own."""
    return getattr(module, "base_layer", getattr(module, "original_module", module))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _listed(patterns: Iterable[str] | None) -> list[str] | None:
    if isinstance(patterns, str):
        raise ValueError(
            f"parameters must be a list of glob patterns, got the string {patterns!r}: write [{patterns!r}]"
        )
    return None if patterns is None else list(patterns)


def _block_weights(model: nn.Module) -> NamedParameters:
    """Weights of linear modules that live in a numbered block (`model.layers.3.self_attn.q_proj`)."""
    found = {}
    for name, module in model.named_modules():
        if _in_block(name) and is_linear(module):
            found[f"{name}.weight"] = module.weight
    return _unique(found.items())


def _stacked_weights(model: nn.Module) -> list[str]:
    """Names of parameters of 3 and more dimensions in the blocks that are no linear module's: fused MoE experts."""
    linear = [name for name, module in model.named_modules() if is_linear(base_layer(module))]
    inside = tuple(f"{name}." for name in linear)
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 3 and _in_block(name) and not name.startswith(inside)
    ]


def _warn_of_stacked(names: list[str], remedy: str) -> None:
    """remedy: with a place for the patterns that choose them."""
    if not names:
        return
    # one name for all blocks
    alike = {".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names}
    patterns = {"*experts*" if "experts" in name else name for name in alike}
    warn_user(
        f"{', '.join(sorted(alike))}: these {len(names)} parameters are no linear modules' weights (experts of a "
        "mixture, stacked into one tensor), so the penalty leaves them out: "
        + remedy.format(patterns=", ".join(map(repr, sorted(patterns))))
    )


def _in_block(name: str) -> bool:
    # below an adapted module a number is the name of an adapter
    return any(part.isdecimal() for part in _ADAPTERS.split(name)[0].split("."))


def is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear module by another name; asking by class name keeps transformers out of the import
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _unique(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> NamedParameters:
    seen: set[int] = set()
    unique = {}
    for name, parameter in named_parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            unique[name] = parameter
    return unique


def _matching(named: dict, patterns: list[str], what: str) -> dict:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"parameters: the pattern {pattern!r} matches none of the {len(named)} {what} "
                f"(the first is {next(iter(named), None)!r})"
            )
    return {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _nothing_selected(named: NamedParameters, candidates: int, patterns: Iterable[str] | None) -> str:
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    if candidates and trained and patterns is None:
        return (
            f"none of the {candidates} weights of linear modules in blocks requires grad; {len(trained)} other "
            f"parameters do (the first is {trained[0]!r}): if it is those, choose them by name, parameters=[...]"
        )
    if candidates:
        return (
            f"none of the {candidates} selected parameters requires grad: unfreeze them before building the regulariser"
        )
    if patterns is None and named:
        return (
            f"no linear module in a numbered block was found among {len(named)} parameters: "
            "choose the parameters by name, parameters=['*weight']"
        )
    return "there are no parameters to regularise"
