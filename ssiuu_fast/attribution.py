"""Attribution of neurons (eq. 1 of arXiv 2509.22263), averaged over the samples of a data set."""

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.attribution_batch import POSITIONS, TARGETS, AttributionBatch, new_hash
from ssiuu_fast.attribution_means import REPLICATES, ROLES, SEED, StreamingMeans
from ssiuu_fast.attribution_taps import AttributionTaps, overwriting_explained
from ssiuu_fast.frozen import frozen, refuse_reentrant
from ssiuu_fast.ops import neuron_attribution
from ssiuu_fast.sites import KINDS, Place, Site, find_sites

__all__ = ["KINDS", "POSITIONS", "TARGETS", "Attribution", "Replicates", "Site", "attribute"]

_FORMAT = "ssiuu_fast.attribution 1"
_NORMS_AFTER_Q_AND_K = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


@dataclass(frozen=True)
class Replicates:
    """Bootstrap over samples: each replicate r weighs sample s by w_rs ~ Poisson(1), drawn from (seed, s).

    weights: [R] float64, Σ_s w_rs. max, positive_max, min: for each site [R] float64, the sum over its neurons of
    Σ_s w_rs · max_k A, … . Divided by weights they are a replicate of the sum over neurons of the mean.
    """

    weights: Tensor
    max: dict[Site, Tensor]
    positive_max: dict[Site, Tensor]
    min: dict[Site, Tensor]


@dataclass(frozen=True)
class Attribution:
    """Means over samples of max_k A, max(max_k A, 0) and min_k A for every neuron; A[i,k] = h[i,k] · ∂T/∂h[i,k].

    max, positive_max, min: for each site [N] on the CPU, float32 (float64 for float64 models). samples: how many.
    settings: all that defines the numbers, as JSON knows it: model, data (sha256 of token ids and labels, in order),
    target, positions, dtype, modules (text of the site → module path), underflows (samples whose T was 0), notes,
    replicates (count and seed).
    """

    max: dict[Site, Tensor]
    positive_max: dict[Site, Tensor]
    min: dict[Site, Tensor]
    samples: int
    settings: dict
    replicates: Replicates | None

    def save(self, path) -> None:
        """Writes one safetensors file: tensors "max.layers.3.Q", …, and the settings as JSON in its metadata."""
        from safetensors.torch import save_file

        tensors = {f"{role}.{site.text}": tensor for role in ROLES for site, tensor in getattr(self, role).items()}
        if self.replicates is not None:
            tensors["replicates.weights"] = self.replicates.weights
            for role in ROLES:
                tensors[f"replicates.{role}"] = torch.stack(list(getattr(self.replicates, role).values()))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": _FORMAT,
            "samples": str(self.samples),
            "sites": json.dumps([site.text for site in self.max]),
            "settings": json.dumps(self.settings),
        }
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path) -> "Attribution":
        """Reads what `save` wrote. Raises ValueError for any other file; nothing in a file is executed."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not an attribution: it is no safetensors file ({error})") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is not an attribution that this version reads: its format is {metadata.get('format')!r} "
                f"instead of {_FORMAT!r}"
            )
        sites = [Site.parse(text) for text in json.loads(metadata["sites"])]
        roles = {role: {site: tensors[f"{role}.{site.text}"] for site in sites} for role in ROLES}
        replicates = None
        if "replicates.weights" in tensors:
            stacked = {role: tensors[f"replicates.{role}"] for role in ROLES}
            replicates = Replicates(
                tensors["replicates.weights"],
                **{role: dict(zip(sites, tensor.unbind(), strict=True)) for role, tensor in stacked.items()},
            )
        return cls(
            **roles,
            samples=int(metadata["samples"]),
            settings=json.loads(metadata["settings"]),
            replicates=replicates,
        )


def attribute(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    target: str = "probability",
    modules: Iterable[str] | None = None,
    positions: str = "all",
) -> Attribution:
    """Attribution of every neuron of every linear module in the blocks, averaged over samples.

        A[s,k,i] = h[s,k,i] · ∂T_s/∂h[s,k,i]        of sample s, token k, neuron i with output h (eq. 1)

    One forward and one backward pass a batch give all samples exactly, since samples don't mix: A is taken with the
    score ℓ_s = log P(y_s|x_s) in place of T_s and its max and min over k are multiplied by ∂T_s/∂ℓ_s ≥ 0, so that a
    probability under the smallest number of the model's dtype loses nothing. No gradient of a weight is computed, and
    nothing is kept for one.

    Args:
        model: a causal language model of transformers, or a module called alike that returns `.logits`; in any mode,
            frozen or not, checkpointed (non-reentrant), with adapters, quantised, or spread by device_map.
        batches: dicts of input_ids, attention_mask and labels, [B, T] int64 each, padded left or right; labels are -100
            outside the answer. Any number, read once.
        target: T. "probability": P(y|x); "log_probability": log P; "mean_token_probability": exp(log P / tokens);
            "logit_difference": logit of the first answer token minus that of the distractor at the same place, and
            batches also hold "distractors", [B] token ids.
        modules: None for all; or glob patterns over sites ("layers.3.Q", "layers.*.down") or module paths.
        positions: the tokens k of a sample that count. "all": attended tokens; "prompt": those without a label;
            "answer": those with one; "no_bos": all but the first attended one. A token k carries h at k, which predicts
            token k+1: what predicts the first answer token is the last of "prompt". The last token of a sample
            predicts nothing that is scored, so A = 0 there: under "all" and "answer" max ≥ 0 ≥ min.

    Memory beside that of a forward and a backward through frozen weights: the outputs that nothing else keeps until the
    backward (mostly Q, K, O, down), none of them where blocks are checkpointed; 24 bytes a neuron for the means.

    Raises:
        ValueError: what is wrong with batch, model or arguments, by name; nothing of the model has changed then.
    """
    for name, value, known in (("target", target, TARGETS), ("positions", positions, POSITIONS)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")
    model = engines.unwrap(model)
    engines.refuse_compiled(model)
    refuse_reentrant(model)
    places = find_sites(model, modules)
    with torch.inference_mode(False), torch.enable_grad():
        reading = _Reading(model, places, target, positions)
        with frozen(model), reading.taps.attached():
            for batch in batches:
                reading.read(batch)
        return reading.result()


class _Reading:
    """One attribution in progress."""

    def __init__(self, model: nn.Module, places: dict[Site, Place], target: str, positions: str):
        self.taps = AttributionTaps({place.path: place.module for place in places.values()}, self._see)
        self._model = model
        self._places = places
        self._target = target
        self._positions = positions
        self._means = StreamingMeans(places)
        self._hash = new_hash()
        self._underflows = 0
        self._dtypes: set[torch.dtype] = set()

    def read(self, batch: Mapping[str, Tensor]) -> None:
        rows = AttributionBatch(batch, target=self._target, positions=self._positions, first=self._means.samples)
        rows.add_to_hash(self._hash)
        with overwriting_explained():
            scores = self._scores(rows)
            self._weights, underflows = rows.weights(scores)
            self._counted = rows.counted
            self.taps.backward(scores.sum())
        self._means.end_batch()
        self._underflows += underflows

    def result(self) -> Attribution:
        if not self._means.samples:
            raise ValueError("there is no batch: nothing to average over")
        weights, replicates = self._means.replicates()
        return Attribution(
            *self._means.means(),
            samples=self._means.samples,
            settings=self._settings(),
            replicates=Replicates(weights, *replicates),
        )

    def _scores(self, rows: AttributionBatch) -> Tensor:
        device = _input_device(self._model)
        inputs = {"input_ids": rows.input_ids.to(device), "attention_mask": rows.attended.long().to(device)}
        parameters = inspect.signature(self._model.forward).parameters
        anything = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        if anything or "use_cache" in parameters:
            inputs["use_cache"] = False
        if "logits_to_keep" in parameters:
            inputs["logits_to_keep"] = rows.logits_to_keep()
        places = rows.position_ids()
        if places is not None and (anything or "position_ids" in parameters):
            inputs["position_ids"] = places.to(device)
        return rows.scores(self._model(**inputs).logits)

    def _see(self, path: str, hidden: Tensor, gradient: Tensor) -> None:
        if hidden.shape[:2] != self._counted.shape or hidden.dim() != 3:
            raise ValueError(
                f"{path} puts out {list(hidden.shape)} for samples and tokens of {list(self._counted.shape)}: neurons "
                "are read from outputs of [batch, tokens, neurons]. Leave it out of modules"
            )
        self._dtypes.add(hidden.dtype)
        found = neuron_attribution(_rows(hidden), _rows(gradient), self._counted.to(hidden.device))
        self._means.add(path, found, self._weights.to(hidden.device, found.max.dtype))

    def _settings(self) -> dict:
        config = getattr(self._model, "config", None)
        return {
            "model": getattr(config, "_name_or_path", "") or type(self._model).__name__,
            "data": self._hash.hexdigest(),
            "target": self._target,
            "positions": self._positions,
            "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self._dtypes)),
            "modules": {site.text: place.path for site, place in self._places.items()},
            "underflows": self._underflows,
            "replicates": {"count": REPLICATES, "seed": SEED},
            "notes": _notes(self._model),
        }


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _notes(model: nn.Module) -> list[str]:
    norms = {name.rpartition(".")[2] for name, _ in model.named_modules()}.intersection(_NORMS_AFTER_Q_AND_K)
    if not norms:
        return []
    return [
        f"this model normalises Q and K after their projections ({', '.join(sorted(norms))}): the attributions of a "
        "head's Q, and of its K, sum to 0 at every token, so D+ and D- of Q and K mirror each other by construction"
    ]


def _input_device(model: nn.Module) -> torch.device:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    parameter = next((embedding or model).parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        return getattr(model, "device", torch.device("cpu"))
    return parameter.device
