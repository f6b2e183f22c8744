"""Greedy answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ssiuu_fast.data.collate import Encoder, collate_prompts
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation.forwards import (
    device_of,
    evaluating,
    forward_module,
    in_lockstep,
    over_ranks,
    progress_bar,
    require_numbers,
)


def generate_answers(
    model,
    encoder: Encoder,
    examples: Sequence[Example],
    max_new_tokens: int = 200,
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """The greedy answer to each question, without special tokens and surrounding space.

    The model's own generation settings (sampling, penalties) are set aside, except its end-of-turn ids, which end an
    answer like the encoder's. Prompt and answer together stay within the model's positions. Raises ValueError for a
    prompt that leaves no room in them, FloatingPointError for a model whose outputs aren't numbers.
    """
    from transformers import GenerationConfig

    model = forward_module(model)
    prompts = [encoder.encode_prompt(example) for example in examples]
    lengths = [len(prompt) for prompt in prompts]
    positions = getattr(model.config, "max_position_embeddings", None)
    if prompts and positions is not None and max(lengths) >= positions:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens fills the model's {positions} positions: nothing can be generated"
        )
    lockstep = in_lockstep(model)
    ends = _end_ids(model.generation_config, encoder)
    settings = {"eos_token_id": ends, "pad_token_id": encoder.pad_id}

    def inputs(rows: Sequence[int]) -> dict:
        batch = collate_prompts([prompts[row] for row in rows], encoder.pad_id)
        return {name: value.to(device_of(model)) for name, value in batch.items()}

    def work(rows: list[int], beside: list[int]) -> list[str]:
        # in lock-step a rank that is done goes on with the others, and must not run out of positions before them
        room = max_new_tokens
        if positions is not None:
            room = min(room, positions - max(lengths[row] for row in beside))
        greedy = GenerationConfig(do_sample=False, num_beams=1, use_cache=True, max_new_tokens=room, **settings)
        batch = inputs(rows)
        output = model.generate(**batch, generation_config=greedy, synced_gpus=lockstep)
        texts = output[:, batch["input_ids"].shape[1] :].tolist()
        return [text.strip() for text in encoder.tokenizer.batch_decode(texts, skip_special_tokens=True)]

    # generate() fills every setting we leave open from the model's own: give it none to take
    own = _instead_of_its_own(model, GenerationConfig(**settings))
    with evaluating(model), own, progress_bar(progress, len(prompts), "answers") as bar:
        if prompts:
            # greedy decoding takes NaN for an answer; every rank looks at the same rows, and raises or goes on
            first = sorted(range(len(prompts)), key=lambda row: -lengths[row])[:batch_size]
            require_numbers(bool(model(**inputs(first), use_cache=False).logits[:, -1].isfinite().all()))
        if lockstep:
            _enter_from_the_root(model)
        return over_ranks(model, lengths, batch_size, work, bar)


@contextmanager
def _instead_of_its_own(model: nn.Module, settings) -> Iterator[None]:
    """Generation settings for a while; of a wrapper of PEFT, which hands its own down, also for the model inside."""
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [vars(holder).get("generation_config") for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = settings
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            if own is None:
                # a wrapper without its own shows those of the model inside
                vars(holder).pop("generation_config", None)
            else:
                holder.generation_config = own


def _enter_from_the_root(model: nn.Module) -> None:
    """Lets FSDP2 see `generate` of a wrapper, whose own forward pass generation goes around."""
    from torch.distributed.fsdp import register_fsdp_forward_method
    from transformers import GenerationMixin

    if not isinstance(model, GenerationMixin) and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")


def _end_ids(generation_config, encoder: Encoder) -> list[int]:
    own = generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*own, *encoder.end_ids})
