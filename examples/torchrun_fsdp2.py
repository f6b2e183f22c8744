"""Unlearning with the model sharded over GPUs: fully_shard, a plain loop under torchrun, and the penalty.

    torchrun --nproc-per-node 8 examples/torchrun_fsdp2.py --model org/name --forget forget.jsonl \\
        --retain retain.jsonl --learning-rate 1e-5 --output unlearned

One GPU: --nproc-per-node 1. Without a GPU the processes run on the CPU, over gloo; without --model they unlearn a small
model. The result is that of plain_loop.py: the 16 rows of a step are shared out to the ranks.
"""

import os

import torch
import torch.distributed as dist
from common import arguments, model_and_rows
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from ssiuu_fast import SSIUURegularizer, answer_token_counts, save_regularizer, sequence_log_probs
from ssiuu_fast.data.collate import Encoder, collate
from ssiuu_fast.sampling import wrapping_batch

parser = arguments(__doc__)
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()
gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
rank, ranks = dist.get_rank(), dist.get_world_size()

model, tokenizer, forget_rows, retain_rows = model_and_rows(options)
encoder = Encoder(tokenizer)
model.to(device).train()
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0)
regularizer = SSIUURegularizer(model, relative_weight=30)  # after fully_shard, which makes other parameters


def log_probs_and_tokens(rows, step):
    """Of this rank's share of the rows, and the answer tokens of all."""
    mine = wrapping_batch(len(rows), 16, seed=0, step=step)[rank::ranks]
    batch = collate([encoder.encode(rows[index]) for index in mine], encoder.pad_id)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    tokens = answer_token_counts(batch["labels"]).sum()
    dist.all_reduce(tokens)
    return sequence_log_probs(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]), tokens


for step in range(options.steps):
    log_probs, tokens = log_probs_and_tokens(forget_rows, step)
    regularizer.backward(log_probs)
    (ranks * log_probs.sum() / tokens).backward()  # FSDP2 takes the mean over ranks
    log_probs, tokens = log_probs_and_tokens(retain_rows, step)
    (-ranks * log_probs.sum() / tokens).backward()
    regularizer.after_backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
    optimizer.step()
    optimizer.zero_grad()
    share = regularizer.penalty_share(norm)
    if rank == 0:
        print(f"step {step + 1}: gradient norm {norm:.3f}, share of the penalty {share:.0%}")

if options.output:
    save_regularizer(regularizer, options.output)  # load_regularizer reads it on any number of ranks
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(options.output, state_dict=weights)
        tokenizer.save_pretrained(options.output)
dist.destroy_process_group()
