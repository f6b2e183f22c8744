"""Unlearning with the model sharded over GPUs: fully_shard, a plain loop under torchrun, and the penalty.

    torchrun --nproc-per-node 8 examples/torchrun_fsdp2.py --model org/name --forget forget.jsonl \\
        --retain retain.jsonl --learning-rate 1e-5 --output unlearned

One GPU: --nproc-per-node 1; without a GPU they run on the CPU. The result is that of plain_loop.py: the 16 rows of a
step are shared out to the ranks.
"""

import os

import torch
import torch.distributed as dist
from common import arguments, batch, model_and_rows, save_sharded
from torch.distributed.fsdp import fully_shard

from ssiuu_fast import SSIUURegularizer, answer_token_counts, models, save_regularizer, sequence_log_probs
from ssiuu_fast.data.collate import Encoder

options = arguments(__doc__).parse_args()
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = models.default_device()
dist.init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
model, tokenizer, forget_rows, retain_rows = model_and_rows(options)
encoder = Encoder(tokenizer)
model.to(device).train()
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0)
regularizer = SSIUURegularizer(model, relative_weight=30)  # after fully_shard, which makes other parameters


def log_probs_and_nll(rows, step):
    """Log-probs of this rank's rows, and NLL a token: its mean over ranks, which FSDP2 takes, is that of all rows."""
    mine = batch(encoder, rows, step, device, rank, ranks)
    tokens = answer_token_counts(mine["labels"]).sum()
    dist.all_reduce(tokens)
    log_probs = sequence_log_probs(model(mine["input_ids"], mine["attention_mask"]).logits, mine["labels"])
    return log_probs, -ranks * log_probs.sum() / tokens


for step in range(options.steps):
    log_probs, nll = log_probs_and_nll(forget_rows, step)
    regularizer.backward(log_probs)
    (-nll).backward()
    _, nll = log_probs_and_nll(retain_rows, step)
    nll.backward()
    regularizer.after_backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
    optimizer.step()
    optimizer.zero_grad()
    share = regularizer.penalty_share(norm)
    if rank == 0:
        print(f"step {step + 1}: gradient norm {norm:.3f}, the penalty's share {share:.0%}")

if options.output:
    save_regularizer(regularizer, f"{options.output}/regularizer")  # for load_regularizer, on any number of ranks
    save_sharded(model, tokenizer, options.output)
dist.destroy_process_group()
