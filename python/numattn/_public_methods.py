"""How inherited methods are named."""

from __future__ import annotations

from types import FunctionType
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def name_methods(public: Class) -> Class:
    """Name methods of private base classes after the public class, as Python's own errors do."""
    for cls in public.__mro__[1:-1]:
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)  # of a classmethod
            if isinstance(function, FunctionType):
                function.__qualname__ = f"{public.__qualname__}.{name}"
    return public
