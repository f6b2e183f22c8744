"""A run that may be killed at any moment: started again it goes on from its last checkpoint.

python killed.py FOLDER: trains into FOLDER and writes the final weights to FOLDER/final.safetensors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import save_file
    from tiny import tiny_llama
    from transformers.trainer_utils import get_last_checkpoint
    from unlearners import dropped_out, trainer

    folder = Path(sys.argv[1])
    run = trainer(
        folder / "run",
        model=dropped_out(tiny_llama(torch.float32), 0.2),
        num_train_epochs=16,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        relative_weight=3.0,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
    )
    there = (folder / "run").is_dir() and get_last_checkpoint(str(folder / "run"))
    run.train(resume_from_checkpoint=bool(there) or None)
    final = {name: tensor.contiguous() for name, tensor in run.model.state_dict().items()}
    save_file(final, folder / "final.part")
    (folder / "final.part").rename(folder / "final.safetensors")
