"""Models and encoders as the options of commands ask for them."""

from typing import Protocol

import torch

from ssiuu_fast import models
from ssiuu_fast.data.collate import Encoder


class ModelOptions(Protocol):
    """What every command that loads a model has among its options."""

    style: str
    max_length: int
    dtype: str
    device: str | None


def load_from(place: str, options: ModelOptions):
    """(model, encoder) of a place, as options say."""
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model, tokenizer = models.load(place, dtype=dtype, device=models.default_device(options.device))
    return model, encoder_of(model, tokenizer, options.style, options.max_length)


def encoder_of(model, tokenizer, style: str, max_length: int) -> Encoder:
    """Rows as these models read them, none longer than the model has positions for."""
    return Encoder(tokenizer, style=style, max_length=min(max_length, positions_of(model.config) or max_length))


def positions_of(config) -> int | None:
    """Longest text of a model in tokens; None where its config doesn't say."""
    return getattr(config, "max_position_embeddings", None)
