"""Warnings that point at the user's own line."""

import os
import sys
import warnings

import torch

# frames in here are between the user's line and the warning: this package's own, and torch's around a hook or no_grad
_INSIDE = tuple(os.path.join(os.path.dirname(package), "") for package in (__file__, torch.__file__))


def warn_user(message: str) -> None:
    """A UserWarning at the innermost line outside of this package and torch, so that it is shown once for each."""
    # what skip_file_prefixes of warnings.warn does from Python 3.12 on
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
