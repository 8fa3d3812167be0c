"""Every sentence that a diagnostic says. A function for each cause; its arguments are the facts.

The modules are read on first use: a spec without errors needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tunelang.dsl.diagnostics.diagnostic import Diagnostic

if TYPE_CHECKING:
    from tunelang.dsl.messages.attributes import *
    from tunelang.dsl.messages.forms import *
    from tunelang.dsl.messages.misfits import *
    from tunelang.dsl.messages.names import *
    from tunelang.dsl.messages.pipeline import *
    from tunelang.dsl.messages.world import *
    from tunelang.dsl.messages.wrong_values import *

_MODULES = ("attributes", "forms", "misfits", "names", "pipeline", "wrong_values", "world")


def __getattr__(name: str) -> Any:
    for module in _MODULES:
        found = import_module(f"tunelang.dsl.messages.{module}")
        message = getattr(found, name, None)
        if message is not None and message.__module__ == found.__name__:
            return message
    raise AttributeError(name)


__all__ = ["Diagnostic"]
