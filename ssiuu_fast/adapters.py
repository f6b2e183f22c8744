"""Adapters of the PEFT package: put on a model, found in a folder or on the hub, merged into their model."""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ssiuu_fast.selection import linear_modules, select_modules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# all that is taken from a repository of the hub: the adapter, and a tokenizer where there is one
_FILES = [CONFIG, WEIGHTS, "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja"]


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Iterable[str] | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """The model, frozen, with trainable low-rank adapters on linear modules (LoRA, arXiv 2106.09685).

    An adapted module puts out W x + (alpha / rank) · B A x, where A [rank, in] and B [out, rank] are in fp32 where the
    model is in 16 bits. B starts at 0, so the model computes what it did.

    alpha: 2 · rank if left open. targets: names of modules or ends of them, as "q_proj" or "mlp.down_proj"; left open,
    all linear modules inside the blocks. dropout: on the input of A while training.

    Raises ValueError, before the model has changed, for a target that no linear module has and for a model that has
    adapters already; ImportError without peft.
    """
    LoraConfig, get_peft_model = _peft("LoraConfig", "get_peft_model")
    if is_adapted(model):
        raise ValueError("the model has adapters already, which are what will be trained: leave lora_rank out")
    names = list(select_modules(model, None)) if targets is None else _checked(targets, model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=names,
        lora_dropout=dropout,
        # GPT-2's Conv1D keeps its weight the other way round
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    with _quiet():
        adapted = get_peft_model(model, config)
    base = Path(config.base_model_name_or_path or "")
    if config.base_model_name_or_path and base.is_dir():
        # the adapter finds its model again from wherever it is loaded
        config.base_model_name_or_path = str(base.resolve())
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Whether this is a model of PEFT, with its adapters around another."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def merged(model: nn.Module) -> nn.Module:
    """The model with its adapters added into its weights, all of which require grad; any other model as it is.

    Raises ValueError where the weights are quantised: adding would round the adapters away.
    """
    if not is_adapted(model):
        return model
    quantized = next((name for name, p in model.named_parameters() if not p.is_floating_point()), None)
    if quantized is not None:
        raise ValueError(
            f"{quantized} is quantised, and adding an adapter to it would round most of that away: load the base model "
            "in 16 or 32 bits"
        )
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"adapters of type {type(model.base_model).__name__} can't be merged into their model")
    return model.merge_and_unload(safe_merge=True).requires_grad_(True)


def find_adapter(name: str | Path) -> Path | None:
    """The folder of an adapter, None where this is the name of something else.

    A folder is one where it has adapter_config.json. A hub name is one where the repository has that file; of it only
    the adapter and its tokenizer are fetched. Raises ValueError for a folder that holds a model beside the adapter:
    which of the two, or whether both, is meant isn't known.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).exists():
            return None
        if holds_model(folder):
            raise ValueError(
                f"{folder} holds both a model (config.json) and an adapter ({CONFIG}): move one of them, with its "
                "*.safetensors, to a folder of its own"
            )
        return folder
    if folder.exists() or folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        return None
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(str(name)) is None:
        return None
    return Path(snapshot_download(str(name), allow_patterns=_FILES))


def holds_model(folder: Path) -> bool:
    """Whether a folder has a model's config and weights, whatever adapter lies beside them."""
    return (folder / "config.json").exists() and any(
        not file.name.startswith("adapter_") for file in folder.glob("*.safetensors")
    )


def base_name(adapter: Path) -> str:
    """Folder or hub name of the model that an adapter is for.

    Raises ValueError for a folder whose weights aren't safetensors, whose config names no base model, or that is of a
    kind that changes more than weights.
    """
    files = sorted(file.name for file in adapter.iterdir())
    if WEIGHTS not in files:
        pickled = (
            " (pickled weights can run code when read, and are never read)" if "adapter_model.bin" in files else ""
        )
        raise ValueError(
            f"{adapter} is an adapter without {WEIGHTS}{pickled}: save it by model.save_pretrained(folder) of a recent "
            f"peft (found: {', '.join(files[:8])})"
        )
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (json.JSONDecodeError, KeyError, TypeError):
        base = None
    if not base:
        raise ValueError(
            f"{adapter / CONFIG} names no base model: write its folder or hub name there as base_model_name_or_path"
        )
    if "num_virtual_tokens" in config:
        raise ValueError(
            f"{adapter} is a {config.get('peft_type')} adapter, which puts tokens before the text: only adapters of "
            "weights (LoRA, IA3 and their kin) are read"
        )
    return base


def attach(model: nn.Module, adapter: Path) -> nn.Module:
    """The model with this adapter, whose weights require grad, on it; the model itself frozen.

    Raises ValueError where the adapter is of another model, ImportError without peft; running out of memory is left to
    the caller.
    """
    (PeftModel,) = _peft("PeftModel")
    try:
        with _quiet():
            # else only a warning: half of an adapter
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except torch.OutOfMemoryError:
        raise  # a RuntimeError too, but the adapter's fault least of all
    except (ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{adapter} can't be put on its base model, is it of another one? ({said[:300]})") from error


def _checked(targets: Iterable[str], model: nn.Module) -> list[str]:
    if isinstance(targets, str):
        raise ValueError(f"lora_targets must be a list of names, got the string {targets!r}: write [{targets!r}]")
    targets = list(targets)
    linear = linear_modules(model)
    unknown = [
        target for target in targets if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if unknown or not targets:
        endings = dict.fromkeys(name.rpartition(".")[2] for name in linear)
        raise ValueError(
            f"lora_targets: no linear module is named {', '.join(unknown) or '(nothing given)'}; this model has "
            f"{', '.join(endings) or 'none'}"
        )
    return targets


def _peft(*names: str) -> tuple:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need the package peft: pip install 'ssiuu-fast[unlearn,peft]'") from error
    return tuple(getattr(peft, name) for name in names)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft asks transformers 5.23 for a property by its older name
        warnings.simplefilter("ignore", FutureWarning)
        yield
