"""Errors of the user's making, through TorchDynamo as they are: one exception, no page around it.

Dynamo wraps what a backend raises in a `BackendCompilerFailed`, with its own message and the user's
stack. One class it lets pass, so that nothing is compiled or cached and the next call asks again.

Private API, checked on torch 2.11 and 2.13: `torch._dynamo.exc.ShortenTraceback`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch._dynamo.exc import ShortenTraceback

_T = TypeVar("_T")


class Refusal(ShortenTraceback):
    """A RuntimeError of one message, whatever Dynamo appends to it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
        self.message = message

    def __str__(self) -> str:
        return self.message

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.message,)

    @args.setter
    def args(self, longer: tuple[Any, ...]) -> None:
        """Dynamo puts its page here."""


class Refused(Refusal, ValueError):
    """An option, or a basis, that cannot be used."""


def plainly(function: Callable[..., _T], *args: Any) -> _T:
    """function(*args); its ValueError or RuntimeError passes through Dynamo as it is.

    What is derived from RuntimeError does not change: Dynamo's own control flow is.
    """
    try:
        return function(*args)
    except ValueError as error:
        refusal: Refusal = Refused(str(error))
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        refusal = Refusal(str(error))
    # Out here it has no context, whose frames would keep the graph alive.
    refusal.first_useful_frame = sys._getframe()
    raise refusal
