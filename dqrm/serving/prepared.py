"""Modules that keep something made from their buffers, and drop it when these change."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn

Held = TypeVar("Held")


class PreparedModule(nn.Module, ABC, Generic[Held]):
    """A module with an object that reads, or copies, its buffers as they are when it is made.

    Subclasses say how to make it in ``_prepare`` and take it from ``prepared``; conversion,
    loading and copying of the module drop it.
    """

    _held: Held | None = None

    def prepared(self) -> Held:
        """Return the object, made at the first call after a change of the buffers."""
        if self._held is None:
            self._held = self._prepare()
        return self._held

    @abstractmethod
    def _prepare(self) -> Held:
        """Make the object."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._held = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._held = None
        super()._load_from_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}
