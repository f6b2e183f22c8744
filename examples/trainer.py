"""Unlearning with UnlearningTrainer: early stop, the best weights kept, checkpoints, several GPUs.

    python examples/trainer.py --output_dir run --learning_rate 2e-3      # a small model, on the CPU
    DATA="--model org/name --forget forget.jsonl --retain retain.jsonl --output_dir run"
    python examples/trainer.py $DATA                                      # 1 GPU, 16 rows a step
    torchrun --nproc-per-node 8 examples/trainer.py $DATA --per_device_train_batch_size 2
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        examples/trainer.py $DATA --per_device_train_batch_size 2

The last two are on 8 GPUs, with a copy of the model on each, and with the model sharded.

Every field of UnlearningConfig is a flag, those of TrainingArguments included: --objective npo, --threshold 0.2,
--gradient_checkpointing true, --save_strategy epoch, and then --resume_from_checkpoint run/checkpoint-40.
"""

from common import Data, model_and_rows
from transformers import HfArgumentParser

from ssiuu_fast import UnlearningConfig, UnlearningTrainer

data, config = HfArgumentParser((Data, UnlearningConfig)).parse_args_into_dataclasses()
model, tokenizer, forget, retain = model_and_rows(data)
trainer = UnlearningTrainer(model, config, forget=forget, retain=retain, processing_class=tokenizer)
trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
trainer.save_model()
if trainer.is_world_process_zero():
    tokenizer.save_pretrained(config.output_dir)
    progress = trainer.progress()
    print(f"forget score {progress.scores[0]:.2f}, then {progress.score:.2f}; stopped by {progress.stopped_by}")
    print(*progress.notes, sep="\n")
