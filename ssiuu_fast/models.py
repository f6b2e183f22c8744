"""Small Llamas from a config, and ordinary Hugging Face folders, of models and of adapters, in and out."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from ssiuu_fast import adapters, engines

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on `texts`, as a PreTrainedTokenizerFast with its own BOS, EOS and pad tokens.

    vocab_size counts everything, the 3 special tokens and the 256 bytes included; a small text may give fewer. The same
    texts give the same tokenizer. It puts BOS before a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    smallest = len(special) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: must be at least {smallest}, the bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def new_llama(
    tokenizer,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    intermediate_size: int | None = None,
    max_positions: int = 512,
    seed: int = 0,
    tie_embeddings: bool = True,
    initializer_range: float = 0.02,
):
    """An untrained fp32 LlamaForCausalLM for this tokenizer, initialised from `seed` alone.

    intermediate_size defaults to about 8/3 of hidden_size. initializer_range is the standard deviation of the first
    weights; the default is that of large models, and one near hidden_size**-0.5 teaches a small model in fewer epochs.
    The global random state is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size % heads or (hidden_size // heads) % 2:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of heads={heads}, with an even size for each head"
        )
    if intermediate_size is None:
        intermediate_size = 16 * round(hidden_size / 6)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_embeddings,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def load(name, dtype: torch.dtype | None = None, device=None, *, load_in_4bit: bool = False):
    """(model, tokenizer) of a Hugging Face folder or hub name, the model in eval mode.

    dtype None keeps the checkpoint's. Code from the model's folder is never run and pickled weights are never read.

    An adapter (PEFT) comes on its base model, which its config names: a PeftModel whose adapter requires grad and whose
    base is frozen. load_in_4bit: the weights of the linear modules but the head in NF4 (QLoRA, arXiv 2305.14314), two
    of them a byte, computed with in `dtype`; they can't be trained themselves.

    Raises FileNotFoundError or ValueError when a local folder isn't a model, or an adapter's base can't be had;
    ImportError where peft, or for 4 bits bitsandbytes, is missing.
    """
    tokenizer = load_tokenizer(name)
    adapter = adapters.find_adapter(name)
    if adapter is None:
        return _load_model(str(name), dtype, device, load_in_4bit).eval(), tokenizer
    with _loading_base(adapter) as base:
        model = _load_model(base, dtype, device, load_in_4bit)
    return adapters.attach(model, adapter).eval(), tokenizer


def load_tokenizer(name):
    """The tokenizer of a model that `load` takes, without the model; of an adapter without its own, that of its base.

    Raises as `load` does.
    """
    adapter = adapters.find_adapter(name)
    if adapter is None:
        _check_folder(name)
        return _load_tokenizer(str(name))
    with _loading_base(adapter) as base:
        if not (adapter / "tokenizer_config.json").exists():
            return _load_tokenizer(base)
    return _load_tokenizer(str(adapter))


def base_name(name) -> str:
    """Of an adapter the folder or hub name of its base model, of any other model its own."""
    adapter = adapters.find_adapter(name)
    return str(name) if adapter is None else adapters.base_name(adapter)


def checkpoint_blocks(model, on: bool = True) -> None:
    """Gradient checkpointing, non-reentrant: blocks are computed again in each backward pass.

    Frozen embeddings don't matter to it, as they do to reentrant checkpointing, which would leave adapters without a
    gradient. Raises ValueError for a model that has none.
    """
    if not model.supports_gradient_checkpointing:
        if on:
            raise ValueError(f"a model of type {model.config.model_type!r} has no gradient checkpointing")
        return
    with warnings.catch_warnings():
        # transformers 5.23 prefers another name, which 5.0 doesn't have
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def _load_model(name: str, dtype: torch.dtype | None, device, load_in_4bit: bool):
    from transformers import AutoModelForCausalLM

    options = {"dtype": "auto" if dtype is None else dtype}
    if load_in_4bit:
        # a model in 4 bits is made on its device, not moved there
        options |= {"quantization_config": _four_bits(dtype), "device_map": {"": device or "cpu"}}
    with _loading(name):
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True, **options)
    engines.keep_unpacked(model)
    return model if device is None or load_in_4bit else model.to(device)


def _four_bits(dtype: torch.dtype | None):
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit needs the package bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def _load_tokenizer(name: str):
    from transformers import AutoTokenizer

    remedy = "is its tokenizer there? Save it beside the model: tokenizer.save_pretrained(folder)"
    with _loading(name, remedy):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


@contextmanager
def _loading_base(adapter: Path) -> Iterator[str]:
    """The name of an adapter's base; what goes wrong with that one is told with what wanted it."""
    base = adapters.base_name(adapter)
    try:
        if adapters.find_adapter(base) is not None:
            raise ValueError(f"{base} is an adapter itself: merge it into its model")
        _check_folder(base)
        yield base
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{adapter} is an adapter of {base}, which can't be loaded: {error}. If that model is elsewhere, write "
            f"where as base_model_name_or_path in {adapter / adapters.CONFIG}"
        ) from error


@contextmanager
def _loading(name: str, remedy: str | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = "the folder" if Path(name).is_dir() else "no such local folder, and by hub name"
        raise OSError(f"can't load {name} ({place}): {error}") from error
    except ValueError as error:
        # transformers writes paragraphs, and doesn't say which folder it is about
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"can't load {name}: " + (f"{remedy} ({said})" if remedy else str(error))) from error


def default_device(name: str | None = None) -> torch.device:
    """The device of this name; None is a GPU where there is one. Raises ValueError for a name torch doesn't know."""
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: say cpu, cuda, cuda:1, mps, …") from None


def save(model, tokenizer, folder, weights: dict | None = None) -> None:
    """Write model (safetensors) and tokenizer as an ordinary Hugging Face folder, for `load` or from_pretrained.

    Of a model with adapters, the adapters alone are written, as PEFT reads them. weights: the whole state dict of a
    sharded model. Raises ValueError, before anything is written, for a folder that has a model where adapters are to be
    saved, or the other way round: neither could be loaded from it.
    """
    folder = Path(folder)
    adapted = adapters.is_adapted(model)
    if adapters.holds_model(folder) if adapted else (folder / adapters.CONFIG).exists():
        what, other = ("an adapter", "a model") if adapted else ("a model", "an adapter")
        raise ValueError(f"{folder} holds {other}, and {what} can't be saved beside it: name another folder")
    model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(folder)


def _check_folder(name) -> None:
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
            raise FileNotFoundError(f"{name}: no such model folder (and not a hub name of the form owner/name)")
        return
    if not folder.is_dir():
        raise ValueError(f"{name} is a file; name the model's folder, with config.json and *.safetensors")
    files = sorted(file.name for file in folder.iterdir())
    if "config.json" not in files:
        raise ValueError(
            f"{name} holds no config.json, so it isn't a Hugging Face model folder "
            f"(found: {', '.join(files[:8]) or 'nothing'})"
        )
    if not any(file.endswith(".safetensors") for file in files):
        pickled = [file for file in files if file.endswith(_PICKLED)]
        if pickled:
            raise ValueError(
                f"{name} has only pickled weights ({', '.join(pickled[:4])}), which can run code when read: "
                "convert them with model.save_pretrained(folder), which writes safetensors"
            )
        raise ValueError(f"{name} has a config.json but no *.safetensors weights (found: {', '.join(files[:8])})")
