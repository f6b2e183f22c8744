"""Unlearning with LoRA: only the adapter is trained, regularised on its A and B matrices, and saved.

    # a small model, on the CPU
    python examples/lora.py --output_dir adapter --learning_rate 8e-3
    DATA="--model org/name --forget forget.jsonl --retain retain.jsonl --output_dir adapter --learning_rate 1e-4"
    python examples/lora.py $DATA --gradient_checkpointing true                                # 1 GPU
    torchrun --nproc-per-node 8 examples/lora.py $DATA --per_device_train_batch_size 2         # 8 GPUs

The flags are those of trainer.py. Put the adapter on its model with peft.PeftModel.from_pretrained(model, "adapter").
"""

from common import Data, model_and_rows
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser

from ssiuu_fast import UnlearningConfig, UnlearningTrainer

data, config = HfArgumentParser((Data, UnlearningConfig)).parse_args_into_dataclasses()
model, tokenizer, forget, retain = model_and_rows(data)
adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, adapter)
model.print_trainable_parameters()

trainer = UnlearningTrainer(model, config, forget=forget, retain=retain, processing_class=tokenizer)
trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
trainer.save_model()
if trainer.is_world_process_zero():
    progress = trainer.progress()
    print(f"forget score {progress.scores[0]:.2f}, then {progress.score:.2f}; stopped by {progress.stopped_by}")
    print(*progress.notes, sep="\n")
