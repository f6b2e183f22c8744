"""What the ranks of a step tell each other before it changes anything: whole numbers to be summed, and errors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ssiuu_fast.ranks import Ranks

# what an error of another rank may be raised as; any other is a RuntimeError
_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, FloatingPointError, FileNotFoundError, OSError)}


class Agreement:
    """Errors of one rank are raised on all, so that no rank waits for one that has left.

    numbers: how many numbers the ranks sum in an exchange; it must be the same in all, since a rank with an error
        takes part in whichever exchange the others come to next.
    due: whether the ranks exchange after a micro-batch (of which is said whether it is the last of its step). It must
        be so before whatever all ranks do together, and may be so where all ranks come by equally often only.
    """

    def __init__(self, ranks: Ranks, numbers: int = 0, due: Callable[[bool], bool] = lambda last: last):
        self.ranks = ranks
        self._numbers = numbers
        self._due = due

    def sums(self, numbers: Sequence[int] = ()) -> list[int]:
        """The sum of each number over the ranks, zeros for those not given. Raises what another rank failed with."""
        return self._exchange(numbers, None)

    def pass_by(self, last: bool) -> None:
        """After a micro-batch that needs no sums: raises what another rank failed with, if that is due."""
        if self._due(last):
            self.sums()

    @contextmanager
    def errors_together(self) -> Iterator[None]:
        """An error in here is told to the other ranks, who are in here too and raise it at their next exchange."""
        try:
            yield
        except (_ElsewhereError, _UntoldError) as held:
            raise held.error from None
        except Exception as error:
            self._exchange((), error)
            raise

    @contextmanager
    def untold(self) -> Iterator[None]:
        """Around what all ranks do together without an exchange: where one fails, none is to be waited for."""
        try:
            yield
        except Exception as error:
            raise _UntoldError(error) from error

    def _exchange(self, numbers: Sequence[int], error: Exception | None) -> list[int]:
        numbers = [*numbers, *[0] * (self._numbers - len(numbers))]
        if self.ranks.size == 1:
            return numbers
        told = torch.tensor([int(error is not None), *numbers], dtype=torch.int64, device=self.ranks.numbers_device)
        failed, *sums = self.ranks.sum_(told).tolist()
        if failed:
            said = self.ranks.gather(None if error is None else (_kind(error), str(error)))
            if error is None:
                rank, (kind, message) = next((rank, what) for rank, what in enumerate(said) if what is not None)
                raise _ElsewhereError(_KINDS.get(kind, RuntimeError)(f"on rank {rank}: {message}"))
        return sums


def _kind(error: Exception) -> str:
    """The name of the nearest class that others can raise."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS), RuntimeError.__name__)


class _HeldError(Exception):
    """An error on its way to whoever is in errors_together."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class _ElsewhereError(_HeldError):
    """Of another rank, that has told of it; it is not told again."""


class _UntoldError(_HeldError):
    """That the others can't be told of."""
