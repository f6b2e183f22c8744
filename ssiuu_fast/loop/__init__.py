"""The parts of the unlearning loop, beside trainer.py: rows, steps, log, best weights, checkpoints, progress."""
