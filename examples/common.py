"""What every example starts with: its arguments, a model with its tokenizer, and the rows to forget and to retain."""

import argparse

import torch

from ssiuu_fast import models
from ssiuu_fast.data import people
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.sources import load_examples
from ssiuu_fast.experiment import small_llama
from ssiuu_fast.training import finetune


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; left out: a small one, taught on the spot")
    parser.add_argument("--forget", help="JSONL of question and answer, or a TOFU split like locuslab/TOFU:forget01")
    parser.add_argument("--retain", help="the same, of what is to be kept")
    parser.add_argument("--output", help="folder for the unlearned model")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="1e-5 is where to start with a real model")
    return parser


def model_and_rows(options):
    """(model, tokenizer, forget, retain), the model in fp32: 16-bit weights lose most updates."""
    if options.model is None:
        return taught_people()
    model, tokenizer = models.load(options.model, dtype=torch.float32)
    return model, tokenizer, load_examples(options.forget), load_examples(options.retain)


def taught_people():
    """A small Llama that was just taught some invented people; the same in every process."""
    split = people.generate(10).split(forget_people=3, retain_people=5)
    model, tokenizer = small_llama(
        split.memorised, vocab_size=512, hidden_size=48, layers=2, heads=4, max_positions=128
    )
    rows = [Encoder(tokenizer).encode(row) for row in split.memorised]
    finetune(model, rows, learning_rate=5e-3, epochs=30, seed=0)
    return model, tokenizer, split.forget, split.retain
