"""Notices a training loop that leaves out a call of a `Method`: it would train something else without a word."""

from collections.abc import Callable
from typing import Any

from loralib.errors import InputError

# What a loop calls for each step, if the method needs it, and where.
CALLS = {
    "penalty": "loss() added to the loss",
    "before_step": "before_step(step) before the optimizer's step",
    "after_step": "after_step(step) after the optimizer's step",
}


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: the default of a method's hooks."""


class Calls:
    """Base of `Method`: notes which of its functions were called since the last step of the optimizer.

    A function that is set after `__init__` is not noted, and nobody is told that it is missing.
    """

    name: str
    penalty_coef: float

    def __post_init__(self) -> None:
        self.called: set[str] = set()
        self._noted: dict[str, Callable[..., Any]] = {}
        self._stepped = False
        for name in CALLS:
            if (call := getattr(self, name)) not in (None, nothing):
                self._noted[name] = self._noting(name, call)
                setattr(self, name, self._noted[name])

    def _noting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            return call(*args, **kwargs)

        return noting

    def forgotten(self, name: str) -> bool:
        """Whether the method needs the call `name` for each step, and nobody has made it since the last step."""
        needed = name in self._noted and getattr(self, name) is self._noted[name]
        return needed and name not in self.called and (name != "penalty" or bool(self.penalty_coef))

    def check_calls(self, *hook: Any) -> None:
        """Called before each step of the method's optimizer.

        Raises:
            InputError: a call is missing; `after_step` is missed before the second step.
        """
        for name, call in CALLS.items():
            if self.forgotten(name) and (name != "after_step" or self._stepped):
                raise InputError(
                    f"{self.name} needs method.{call}, which this loop leaves out: docs/library.md shows all calls; "
                    "in a Trainer, MethodCallback makes them."
                )
        self.called.clear()
        self._stepped = True
