"""Log-probabilities of the starting model: computed once, kept on disk, so that no second model stays in memory."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ssiuu_fast.agreement import Agreement
from ssiuu_fast.data.collate import Encoded, collate
from ssiuu_fast.engines import bare
from ssiuu_fast.evaluation.forwards import device_of, evaluating, over_ranks, progress_bar
from ssiuu_fast.objectives.log_probs import answer_log_probs
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.shards import sharded_modules, whole

logger = logging.getLogger(__name__)
_FORMAT = "ssiuu_fast.reference_log_probs 1"
_CHUNK = 64 * 1024 * 1024


def reference_log_probs(
    model: nn.Module,
    rows: Sequence[Encoded],
    cache_dir,
    *,
    fingerprint: str | None = None,
    batch_size: int = 16,
    description: str | None = None,
) -> Tensor:
    """log P(y|x) of each row under the model as it is now, [rows] on the CPU: fp32, fp64 for fp64 models.

    Without dropout and gradient, in batches by length, each module afterwards in the mode it had. The model may be
    wrapped (DDP, FSDP2); every rank calls this with the same rows and gets the same numbers. Under autocast call it
    inside the same context as training. What fails on one rank is raised on all (but see `over_ranks`).

    Read from cache_dir where an earlier run left them for the same weights, config, token ids, labels (which hold
    data, template, tokenizer and length limit), active adapters and dtype; a file that is damaged or not of this is
    computed anew.
    cache_dir None keeps nothing. fingerprint: of `model_fingerprint`, where the caller has it. A description shows a
    progress bar.
    """
    ranks = Ranks()
    fingerprint = fingerprint or model_fingerprint(model)
    key = _key(fingerprint, rows, f"{_dtype(model)} {_adapters(model)}".rstrip())
    file = None if cache_dir is None else Path(cache_dir) / f"reference-{key}.safetensors"
    agreement, keeps = Agreement(ranks), file is not None and ranks.rank == 0
    with agreement.errors_together():
        found = _read(file, key, len(rows)) if keeps else None
        agreement.sums()
    # one rank's disk decides for all
    kept = ranks.gather(found)[0]
    if kept is None:
        kept = _compute(model, rows, batch_size, description)
        with agreement.errors_together():
            if keeps:
                _write(file, key, kept)
            agreement.sums()
    numbers, double = kept
    return torch.tensor(numbers, dtype=torch.float64 if double else torch.float32)


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over the config and the names, dtypes, shapes and bytes of all weights and buffers of the state dict.

    Where weights are sharded (FSDP2) every rank calls it; one is gathered at a time.
    """
    model = bare(model)
    digest = hashlib.sha256()
    configs = {"": getattr(model, "config", None), **getattr(model, "peft_config", {})}
    for name, config in configs.items():
        digest.update(f"{name} {_config_text(config)}".encode())
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        _add_bytes(digest, tensor)
    return digest.hexdigest()


# numbers, and whether they are fp64
_Kept = tuple[list[float], bool]


def _compute(model: nn.Module, rows: Sequence[Encoded], batch_size: int, description: str | None) -> _Kept:
    # DistributedDataParallel would exchange buffers, which not every rank comes by
    model = bare(model)

    def work(own: list[int], _) -> list[tuple[float, bool]]:
        batch = collate([rows[row] for row in own])
        log_probs = answer_log_probs(model, {name: tensor.to(device_of(model)) for name, tensor in batch.items()})
        return [(number, log_probs.dtype == torch.float64) for number in log_probs.tolist()]

    lengths = [len(row.input_ids) for row in rows]
    with evaluating(model), progress_bar(description is not None, len(rows), description) as bar:
        found = over_ranks(model, lengths, batch_size, work, bar)
    ordered = [number for number, _ in found]
    double = any(double for _, double in found)
    broken = [index for index, number in enumerate(ordered) if not math.isfinite(number)]
    if broken:
        raise ValueError(
            f"the starting model gives row {broken[0]} the log-probability {ordered[broken[0]]}, and {len(broken)} of "
            f"{len(rows)} rows such: are its weights sound, and does its dtype hold its activations?"
        )
    return ordered, double


def _key(fingerprint: str, rows: Sequence[Encoded], dtype: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {fingerprint} {dtype}".encode())
    for row in rows:
        digest.update(json.dumps([row.input_ids, row.labels]).encode())
    return digest.hexdigest()


def _dtype(model: nn.Module) -> str:
    """What the model computes in, with the mixed precisions of FSDP2's groups."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    # torch has no public way to ask a module for its policy
    policies = [module._get_fsdp_state()._mp_policy for module in sharded_modules(model)]
    mixed = {(policy.param_dtype, policy.output_dtype, policy.cast_forward_inputs) for policy in policies}
    return " ".join([str(dtype), *sorted(str(precision) for precision in mixed if precision[:2] != (None, None))])


def _adapters(model: nn.Module) -> str:
    """Which adapters of PEFT take part and how strongly, over all adapted modules; empty for none."""
    layers = [(name, layer) for name, layer in bare(model).named_modules() if hasattr(layer, "base_layer")]
    taking_part = [
        (name, list(layer.active_adapters), layer.disable_adapters, getattr(layer, "scaling", None))
        for name, layer in layers
        if hasattr(layer, "active_adapters")
    ]
    return str(taking_part) if taking_part else ""


def _config_text(config) -> str:
    # where a model was loaded from, and by which version, is not what it is
    elsewhere = ("_name_or_path", "transformers_version", "peft_version")
    values = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in elsewhere}
    # the order of a set changes from process to process
    return json.dumps(values, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))


def _add_bytes(digest, tensor: Tensor) -> None:
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    for start in range(0, len(values), _CHUNK):
        digest.update(values[start : start + _CHUNK].cpu().numpy())


def _checksum(values: Tensor) -> str:
    digest = hashlib.sha256()
    _add_bytes(digest, values)
    return digest.hexdigest()


def _read(file: Path, key: str, rows: int) -> _Kept | None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            values = opened.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged and will be computed anew (%s)", file, error)
        return None
    if metadata.get("key") != key or metadata.get("checksum") != _checksum(values) or values.shape != (rows,):
        logger.warning("%s doesn't hold what its name says and will be computed anew", file)
        return None
    return values.tolist(), values.dtype == torch.float64


def _write(file: Path, key: str, kept: _Kept) -> None:
    from safetensors.torch import save_file

    numbers, double = kept
    values = torch.tensor(numbers, dtype=torch.float64 if double else torch.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    # another process may be writing the same
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        save_file({"log_probs": values}, str(temporary), {"format": _FORMAT, "key": key, "checksum": _checksum(values)})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
