"""The check of annotations, array shapes among them, that `conftest` puts on every function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

# JAX takes arrays of numpy wherever it takes its own.
_CONFIGURATION = BeartypeConf(hint_overrides=FrozenDict({jax.Array: jax.Array | np.ndarray}))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and result of each call.

    Constructors are left alone: JAX rebuilds dataclasses with shardings or placeholders in place of
    arrays. Functions within functions are too, since each call of the outer one would make a check.
    beartype knows `Self` only where it decorates the class.
    """
    inner = "<locals>" in function.__qualname__
    if inner or function.__name__ == "__init__" or Self in function.__annotations__.values():
        return function
    return beartype(function, conf=_CONFIGURATION)
