"""Functions of the user whose results have the wrong shape."""

import jax.numpy as jnp


def shapeless(logits, targets):
    return jnp.float32(0)
