"""Unlearning in a plain PyTorch loop: the penalty is one line in place of the loss's own backward.

    python examples/plain_loop.py                                   # a small model, a minute on the CPU
    python examples/plain_loop.py --model org/name --forget forget.jsonl --retain retain.jsonl \\
        --learning-rate 1e-5 --output unlearned

One process, on a GPU where there is one. For 8 GPUs the same loop is in torchrun_fsdp2.py.
"""

import torch
from common import arguments, batch, model_and_rows

from ssiuu_fast import SSIUURegularizer, answer_token_counts, models, sequence_log_probs
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.evaluation.scores import score

options = arguments(__doc__).parse_args()
model, tokenizer, forget_rows, retain_rows = model_and_rows(options)
model.to(models.default_device())
encoder = Encoder(tokenizer)


def report(when):
    forget, retain = (score(model, encoder, rows).mean for rows in (forget_rows, retain_rows))
    print(f"{when}: score of the forget set {forget:.2f}, of the retain set {retain:.2f}")


report("before")
model.train()
optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0)
regularizer = SSIUURegularizer(model, relative_weight=30)

for step in range(options.steps):
    forget, retain = (batch(encoder, rows, step, model.device) for rows in (forget_rows, retain_rows))
    log_probs = sequence_log_probs(model(forget["input_ids"], forget["attention_mask"]).logits, forget["labels"])
    loss = log_probs.sum() / answer_token_counts(forget["labels"]).sum()  # gradient ascent on the answers
    regularizer.backward(log_probs, loss=loss)  # in place of loss.backward()
    model(**retain).loss.backward()
    regularizer.after_backward()  # measures the gradient until λ is fixed
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    share, log_p = regularizer.penalty_share(norm), log_probs.mean().item()
    print(f"step {step + 1}: log P {log_p:.2f}, gradient norm {norm:.3f}, the penalty's share {share:.0%}")

report("after")
if options.output:
    models.save(model, tokenizer, options.output)
