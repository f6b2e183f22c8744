"""What the examples share: their arguments, a model with its tokenizer, rows to forget and to retain, and batches."""

import argparse
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ssiuu_fast import models
from ssiuu_fast.data import people
from ssiuu_fast.data.collate import Encoder, collate
from ssiuu_fast.data.sources import load_examples
from ssiuu_fast.experiment import small_llama
from ssiuu_fast.sampling import wrapping_batch
from ssiuu_fast.training import finetune


@dataclass
class Data:
    """model: folder or hub name; left out, a small one is taught on the spot. forget, retain: JSONL files with question
    and answer, or TOFU splits like locuslab/TOFU:forget01."""

    model: str | None = None
    forget: str | None = None
    retain: str | None = None


def arguments(description: str) -> argparse.ArgumentParser:
    """Of the plain loops: those of Data and a few more."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--forget", "--retain", "--output"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser


def model_and_rows(data: Data):
    """(model, tokenizer, forget, retain), the model in fp32: 16-bit weights lose most updates."""
    if data.model is None:
        return taught_people()
    model, tokenizer = models.load(data.model, dtype=torch.float32)
    return model, tokenizer, load_examples(data.forget), load_examples(data.retain)


def taught_people():
    """A small Llama that was just taught some invented people; the same in every process."""
    split = people.generate(10).split(forget_people=3, retain_people=5)
    model, tokenizer = small_llama(
        split.memorised, vocab_size=512, hidden_size=48, layers=2, heads=4, max_positions=128
    )
    rows = [Encoder(tokenizer).encode(row) for row in split.memorised]
    finetune(model, rows, learning_rate=5e-3, epochs=30, seed=0)
    return model, tokenizer, split.forget, split.retain


def batch(encoder: Encoder, rows, step: int, device, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """A rank's share of the 16 rows of a step. Always as many: attributions are sums over them."""
    mine = wrapping_batch(len(rows), 16, seed=0, step=step)[rank::ranks]
    tensors = collate([encoder.encode(rows[index]) for index in mine], encoder.pad_id)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def save_sharded(model, tokenizer, folder) -> None:
    """The whole model of fully_shard, gathered on the CPU, as an ordinary Hugging Face folder. On every rank."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
