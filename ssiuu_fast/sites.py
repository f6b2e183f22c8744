"""Which linear module of which block holds which neurons: sites (layer, kind) and where a model keeps them."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssiuu_fast.selection import base_layer

KINDS = ("Q", "K", "V", "O", "gate", "up", "down")


class Site(NamedTuple):
    """One linear module of one block, or its part of a fused one. kind: one of KINDS; for modules that the table of
    names doesn't know, their path inside the block."""

    layer: int
    kind: str

    @property
    def text(self) -> str:
        """As in "layers.3.Q"."""
        return f"layers.{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site of such a text."""
        word, layer, kind = text.split(".", 2)
        if word != "layers" or not layer.isdecimal():
            raise ValueError(f"{text!r} is not a site: it must read like 'layers.3.Q'")
        return cls(int(layer), kind)


class Place(NamedTuple):
    """Where the neurons of a site are: neuron i is output column columns[i] of the module at that path."""

    path: str
    module: nn.Module
    # slice(None) where the module is not fused
    columns: slice | Tensor


Columns = dict[str, slice | Tensor]


class Runs(NamedTuple):
    """Columns of a fused module in three numbers that go into a file: runs of `length`, `stride` apart."""

    start: int
    length: int
    stride: int

    def column(self, neuron: int) -> int:
        run, offset = divmod(neuron, self.length)
        return self.start + run * self.stride + offset


def column_runs(columns: slice | Tensor) -> Runs | None:
    """None where a site is its whole module, whose neuron i is column i."""
    if isinstance(columns, slice):
        return None if columns == slice(None) else Runs(columns.start, columns.stop - columns.start, 0)
    places = columns.tolist()
    ends = [place for place in range(1, len(places)) if places[place] != places[place - 1] + 1]
    length = ends[0] if ends else len(places)
    runs = Runs(places[0], length, places[length] - places[0] if ends else 0)
    assert [runs.column(neuron) for neuron in range(len(places))] == places
    return runs


def _qkv_one_after_the_other(module: nn.Module, config) -> Columns:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head
    keys = config.num_key_value_heads * head
    return {
        "Q": slice(0, queries),
        "K": slice(queries, queries + keys),
        "V": slice(queries + keys, queries + 2 * keys),
    }


def _qkv_head_by_head(module: nn.Module, config) -> Columns:
    # [heads, 3, head]: q, k and v of one head lie together
    columns = torch.arange(_width(module)).view(config.num_attention_heads, 3, -1)
    return {kind: columns[:, part].flatten() for part, kind in enumerate("QKV")}


def _equal_parts(*kinds: str) -> Callable[[nn.Module, object], Columns]:
    def parts(module: nn.Module, config) -> Columns:
        size = _width(module) // len(kinds)
        return {kind: slice(part * size, (part + 1) * size) for part, kind in enumerate(kinds)}

    return parts


# paths inside a block; a new architecture is new lines here
_KIND_OF_PATH = {
    # Llama, Qwen2 to 3, Mistral, Gemma 1 to 3, OLMo and others
    "self_attn.q_proj": "Q",
    "self_attn.k_proj": "K",
    "self_attn.v_proj": "V",
    "self_attn.o_proj": "O",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    # Phi 1 and 2
    "self_attn.dense": "O",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    # GPT-2
    "attn.c_proj": "O",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    # GPT-NeoX
    "attention.dense": "O",
    "mlp.dense_h_to_4h": "up",
    "mlp.dense_4h_to_h": "down",
    # OPT
    "self_attn.out_proj": "O",
    "fc1": "up",
    "fc2": "down",
    # GPT-J
    "attn.q_proj": "Q",
    "attn.k_proj": "K",
    "attn.v_proj": "V",
    "attn.out_proj": "O",
    "mlp.fc_in": "up",
    "mlp.fc_out": "down",
}
_COLUMNS_OF_FUSED = {
    # Phi 3 and 4
    "self_attn.qkv_proj": _qkv_one_after_the_other,
    "mlp.gate_up_proj": _equal_parts("gate", "up"),
    # GPT-2
    "attn.c_attn": _equal_parts("Q", "K", "V"),
    # GPT-NeoX
    "attention.query_key_value": _qkv_head_by_head,
}


def find_sites(model: nn.Module, modules: Iterable[str] | None = None) -> dict[Site, Place]:
    """The sites of a model by layer and kind, and where they are.

    modules: None for all linear modules of the blocks; or glob patterns, each over the texts of sites ("layers.3.Q",
    "layers.*.down") or over module paths ("model.layers.3.*").

    Raises ValueError for a pattern that fits nothing and, where `modules` is None, for fused experts and for linear
    modules in blocks whose names aren't known.
    """
    known, unknown = _walk(model)
    if modules is None:
        refuse_fused_experts(model)
        if unknown or not known:
            raise ValueError(_unknown(model, known, unknown))
        chosen = known
    else:
        chosen = _matching(known + unknown, modules)
    return _by_site(chosen)


def refuse_fused_experts(model: nn.Module) -> None:
    """Raises ValueError for a parameter with three dimensions in a block: experts in one tensor have no linear module
    whose output could be seen."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and _split(name) is not None:
            raise ValueError(
                f"{name} has shape {list(parameter.shape)}: fused experts (mixture of experts) have no linear module "
                "for each, so their neurons can't be read. Choose what is to be read by modules=[...], for example "
                "modules=['layers.*.[QKVO]']"
            )


def _walk(model: nn.Module) -> tuple[list[tuple[Site, Place]], list[tuple[Site, Place]]]:
    """Sites that the table knows, and linear modules in blocks that it doesn't."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    known, unknown, found = [], [], []
    for path, module in model.named_modules():
        # what is below a site, or below the head, belongs to it: adapters, the module they were put around
        if any(path.startswith(outer) for outer in found):
            continue
        split = _split(path)
        if split is None:
            if _is_linear(base_layer(module)):
                found.append(f"{path}.")
            continue
        layer, inside = split
        if inside in _KIND_OF_PATH:
            columns = {_KIND_OF_PATH[inside]: slice(None)}
        elif inside in _COLUMNS_OF_FUSED:
            columns = _COLUMNS_OF_FUSED[inside](module, config)
        elif _is_linear(base_layer(module)):
            unknown.append((Site(layer, inside), Place(path, module, slice(None))))
            found.append(f"{path}.")
            continue
        else:
            continue
        known += [(Site(layer, kind), Place(path, module, part)) for kind, part in columns.items()]
        found.append(f"{path}.")
    return known, unknown


def _split(path: str) -> tuple[int, str] | None:
    """(number of the block, path inside it); None outside of blocks. A block that is itself linear is 'linear'."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[place + 1 :]) or "linear"
    return None


def _matching(candidates: list[tuple[Site, Place]], modules: Iterable[str]) -> list[tuple[Site, Place]]:
    if isinstance(modules, str):
        raise ValueError(f"modules must be a list of patterns, got the string {modules!r}: write [{modules!r}]")
    modules = list(modules)
    for pattern in modules:
        if not any(_fits(candidate, pattern) for candidate in candidates):
            raise ValueError(
                f"modules: the pattern {pattern!r} fits none of the {len(candidates)} sites in numbered blocks, "
                "neither by site nor by path" + (f" (the first is {_named(candidates[0])})" if candidates else "")
            )
    if not modules:
        raise ValueError("modules is empty: give at least one pattern, or None for all")
    return [candidate for candidate in candidates if any(_fits(candidate, pattern) for pattern in modules)]


def _fits(candidate: tuple[Site, Place], pattern: str) -> bool:
    site, place = candidate
    return fnmatchcase(site.text, pattern) or fnmatchcase(place.path, pattern)


def _named(candidate: tuple[Site, Place]) -> str:
    site, place = candidate
    return f"{site.text!r} at {place.path!r}"


def _by_site(chosen: list[tuple[Site, Place]]) -> dict[Site, Place]:
    places: dict[Site, Place] = {}
    for site, place in chosen:
        if site in places:
            raise ValueError(
                f"{places[site].path} and {place.path} are both {site.text}: choose one by modules=[...], a pattern "
                "over module paths"
            )
        places[site] = place
    return dict(sorted(places.items(), key=lambda item: _order(item[0])))


def _order(site: Site) -> tuple:
    return site.layer, KINDS.index(site.kind) if site.kind in KINDS else len(KINDS), site.kind


def _unknown(model: nn.Module, known: list, unknown: list) -> str:
    names = [place.path for _, place in unknown]
    if not names and not known:
        names = [name for name, module in model.named_modules() if _is_linear(base_layer(module))]
        found = f"no linear module in a numbered block (linear modules: {', '.join(names[:8]) or 'none'})"
        return f"{type(model).__name__} has {found}: there are no neurons to read"
    return (
        f"{type(model).__name__} has {len(names)} linear modules in blocks whose names aren't known as Q, K, V, O, "
        f"gate, up or down: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}. Give patterns over sites or "
        f"module paths, for example modules=[{names[0]!r}]"
    )


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear module by another name; asking by class name keeps transformers out of the import
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _width(module: nn.Module) -> int:
    """Output columns of a linear module."""
    module = base_layer(module)
    return module.nf if hasattr(module, "nf") else module.out_features
