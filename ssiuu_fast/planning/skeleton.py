"""A model without its weights: what can be counted on it, and run with it, takes no memory."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssiuu_fast.models import checkpoint_blocks
from ssiuu_fast.objectives.answer_head import head_replaced, plain_head
from ssiuu_fast.selection import select_modules, select_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Counts:
    """What is in a model. Elements, not bytes; `copied` are those that BestWeights keeps (loop/best.py)."""

    parameters: int
    regularized: tuple[int, ...]  # elements of each regularised parameter
    largest: int
    block: int  # the largest block
    copied: int
    modules: int
    neurons: int


class Skeleton:
    """A model of fake tensors: shapes and dtypes, which every operator accepts and which hold no memory.

    Raises ValueError where transformers has no causal language model of this type, and for mixtures of experts.
    """

    def __init__(self, config, dtype: str = "float32"):
        from transformers import AutoModelForCausalLM

        self.name = config.model_type
        self.dtype = DTYPES[dtype]
        self.fake = FakeTensorMode()
        with self.fake:
            try:
                self.model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            except ValueError as error:
                raise ValueError(
                    f"no causal language model of type {config.model_type!r}: {first_line(error)}"
                ) from None
        if any(parameter.dim() == 3 for parameter in self.model.parameters()):
            raise ValueError(
                f"a model of type {self.name!r} has fused experts, whose work depends on the tokens: give the shape of "
                "a similar Llama by numbers instead of --model"
            )
        self.vocabulary: int = self.model.get_input_embeddings().num_embeddings
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self.counts = _counted(self.model)

    @cached_property
    def head(self) -> nn.Linear | None:
        """The head in which log-probs are formed without logits; None where a run may need those.

        A run compares values (`answer_head`). Here there are none, and the head's output must be what the model puts
        out, untouched. Raises RuntimeError for a model that can't be run so.
        """
        head, _ = plain_head(self.model)
        if head is None:
            return None
        given: list[Tensor] = []

        def seen(hidden: Tensor) -> Tensor:
            given.append(nn.Linear.forward(head, hidden))
            return given[-1]

        with self.fake, torch.no_grad(), head_replaced(head, seen):
            tokens = torch.zeros((1, 2), dtype=torch.int64)
            logits = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return head if len(given) == 1 and logits is given[0] and logits._version == 0 else None

    def checkpoint(self, on: bool) -> None:
        """Gradient checkpointing, non-reentrant; raises ValueError for a model that has none."""
        checkpoint_blocks(self.model, on)


def read_config(name: str):
    """The config of a model folder or hub name; config.json is all that is read.

    Raises OSError where there is none, ValueError for a type that transformers doesn't know.
    """
    from transformers import AutoConfig

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise FileNotFoundError(f"{name} holds no config.json, so it isn't a Hugging Face model folder")
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such model folder (and not a hub name of the form owner/name)")
    if folder.is_file():
        raise ValueError(f"{name} is a file; name the model's folder, with config.json")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        place = "the folder" if folder.is_dir() else "no such local folder, and by hub name"
        raise OSError(f"can't read the config of {name} ({place}): {first_line(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"can't read the config of {name}: {first_line(error)}") from None
    # of a model that also sees or hears, the part that unlearns
    return config.get_text_config()


def llama_config(
    hidden_size: int, layers: int, heads: int, kv_heads: int, intermediate_size: int, vocab_size: int, tied: bool
):
    """A Llama of these sizes. Raises ValueError for sizes that don't go together."""
    from transformers import LlamaConfig

    if hidden_size % heads or (hidden_size // heads) % 2:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of heads={heads}, with an even size for each head"
        )
    if heads % kv_heads:
        raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
    return LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        max_position_embeddings=1 << 20,
    )


def _counted(model: nn.Module) -> Counts:
    sizes = [parameter.numel() for parameter in model.parameters()]
    regularized = select_parameters(model, None)
    modules = select_modules(model, None)
    saved = model.state_dict()
    blocks: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        if numbered is not None:
            block = ".".join(parts[: numbered + 1])
            blocks[block] = blocks.get(block, 0) + parameter.numel()
    return Counts(
        parameters=sum(sizes),
        regularized=tuple(parameter.numel() for parameter in regularized.values()),
        largest=max(sizes),
        block=max(blocks.values()),
        copied=sum(sizes) + sum(buffer.numel() for name, buffer in model.named_buffers() if name in saved),
        modules=len(modules),
        neurons=sum(_width(module) for module in modules.values()),
    )


def _width(module: nn.Module) -> int:
    # GPT-2's Conv1D has another name for it
    return module.nf if hasattr(module, "nf") else module.out_features


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
