"""Plain fine-tuning on answers: how a model is taught, and how it is attacked."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from ssiuu_fast.data.collate import Encoded, collate
from ssiuu_fast.objectives.log_probs import answer_log_probs, nll_per_token
from ssiuu_fast.ops.sequence_log_probs import answer_token_counts
from ssiuu_fast.sampling import epoch_batches

CLIP_NORM = 1.0


def new_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.999) and no weight decay, over the parameters that require grad."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires grad: unfreeze what is to be trained")
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)


def clip(model: nn.Module) -> float:
    """Clips the gradient of all parameters to norm 1 and returns the norm it had."""
    return nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item()


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def finetune(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    learning_rate: float,
    epochs: int,
    seed: int,
    batch_size: int = 16,
    after_step: Callable[[int, float], None] | None = None,
    after_epoch: Callable[[int], bool] | None = None,
    description: str | None = None,
) -> int:
    """Minimises NLL a token of the answers with a constant learning rate; returns the steps taken.

    after_step(step, loss) is called after each step, counted from 1; after_epoch(epoch) after each epoch, counted from
    1: True ends the training. A description shows a progress bar.
    """
    if not rows:
        raise ValueError("there are no rows to train on")
    device = next(model.parameters()).device
    optimizer = new_optimizer(model, learning_rate)
    step = 0
    with tqdm(total=epochs * -(-len(rows) // batch_size), desc=description, disable=description is None) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            for indices in epoch_batches(len(rows), batch_size, seed, epoch):
                batch = on_device(collate([rows[index] for index in indices]), device)
                tokens = int(answer_token_counts(batch["labels"]).sum())
                optimizer.zero_grad(set_to_none=True)
                loss = nll_per_token(answer_log_probs(model, batch), tokens)
                loss.backward()
                clip(model)
                optimizer.step()
                step += 1
                bar.update()
                if bar.disable is False and step % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                if after_step is not None:
                    after_step(step, loss.item())
            if after_epoch is not None and after_epoch(epoch):
                break
    # not for whoever trains the model next to add to
    model.zero_grad(set_to_none=True)
    model.eval()
    return step
