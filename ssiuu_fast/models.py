"""Small Llamas from a config, and ordinary Hugging Face folders in and out."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

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


def load(name, dtype: torch.dtype | None = None, device=None):
    """(model, tokenizer) of a Hugging Face folder or hub name, the model in eval mode.

    dtype None keeps the checkpoint's. Code from the model's folder is never run and pickled weights are never read.
    Raises FileNotFoundError or ValueError when a local folder isn't a model.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name)
    name = str(name)
    with _loading(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto" if dtype is None else dtype, trust_remote_code=False, use_safetensors=True
        )
    if device is not None:
        model = model.to(device)
    return model.eval(), tokenizer


def load_tokenizer(name):
    """The tokenizer of a model that `load` takes, without the model. Raises as `load` does."""
    from transformers import AutoTokenizer

    _check_folder(name)
    remedy = "is its tokenizer there? Save it beside the model: tokenizer.save_pretrained(folder)"
    with _loading(str(name), remedy):
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)


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


def save(model, tokenizer, folder) -> None:
    """Write model (safetensors) and tokenizer as an ordinary Hugging Face folder, for `load` or from_pretrained."""
    folder = Path(folder)
    model.save_pretrained(folder)
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
    weights = [file for file in files if file.endswith(".safetensors") and not file.startswith("adapter_")]
    if "adapter_config.json" in files and not ("config.json" in files and weights):
        raise ValueError(
            f"{name} is a PEFT adapter without its model: merge it first, model.merge_and_unload() and then "
            "save_pretrained(folder) of the result and of the tokenizer, and name that folder"
        )
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
