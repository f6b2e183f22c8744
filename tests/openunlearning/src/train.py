"""Stands for OpenUnlearning's main: remembers what it was called with, and which trainers it could choose from."""

import sys

import trainer

if __name__ == "__main__":
    trainer.SEEN = {"arguments": sys.argv[1:], "trainers": set(trainer.TRAINER_REGISTRY)}
