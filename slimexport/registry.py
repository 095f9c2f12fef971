"""One generic registry: named things of ours, found by importing them, and of third parties, by entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from slimexport.errors import BadInputError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to values of one kind ("criterion", "target", ...).

    `package` is imported file by file on first use, so that one new file in it is a new entry; entry points of
    group `group` are loaded after that, so that a third party needs no change here.
    """

    def __init__(self, kind: str, *, package: str, group: str):
        self.kind, self._package, self._group = kind, package, group
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator (or plain call) that files `value` under `name`; a name can be taken once."""

        def add(value: T) -> T:
            if name in self._entries and self._entries[name] is not value:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = value
            return value

        return add

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=self._group):
            value = point.load()
            if point.name not in self._entries:
                self.register(point.name)(value)

    @contextmanager
    def including(self, name: str, value: T) -> Iterator[None]:
        """Within it, `name` is `value`, whether it is known otherwise or not."""
        self._discover()
        known = dict(self._entries)
        self._entries[name] = value
        try:
            yield
        finally:
            self._entries = known

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """Raises BadInputError that lists the known names and the nearest one."""
        self._discover()
        if name not in self._entries:
            known = self.names()
            raise BadInputError(f"Unknown {self.kind} {name!r}: known are {', '.join(known)}.{nearest(name, known)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
