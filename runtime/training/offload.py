"""Moments that lie in the memory of the host: copied to the device one parameter at a time."""

from __future__ import annotations

from typing import Literal

import jax
import optax
from flax import nnx
from jaxtyping import PyTree

from tunelang.runtime.sharding import is_variable, logical_axes

Variable = nnx.Variable[jax.Array]


def offload(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make a rule update one parameter after another, with its moments in the host's memory.

    Moments of one parameter, and of one layer where layers are stacked, are on the device at once.
    The state is the rule's, which has to treat each parameter by itself.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        gradients, structure = jax.tree.flatten(updates, is_leaf=is_variable)
        values = jax.tree.leaves(params, is_leaf=is_variable)
        changes: list[Variable] = []
        states: list[PyTree] = []

        def is_moments(node: PyTree) -> bool:
            node_structure: object = jax.tree.structure(node, is_leaf=is_variable)
            return node_structure == structure

        def select(node: PyTree) -> PyTree:
            """Return the next parameter's part of the state: moments as a list of one."""
            if not is_moments(node):
                return node
            return [jax.tree.leaves(node, is_leaf=is_variable)[len(changes)]]

        def join(node: PyTree, *parts: PyTree) -> PyTree:
            if not is_moments(node):
                return parts[-1]
            return jax.tree.unflatten(structure, [moment for (moment,) in parts])

        for gradient, value in zip(gradients, values, strict=True):
            part = jax.tree.map(select, state, is_leaf=is_moments)
            # Without the barrier XLA brings the moments of all parameters to the device at once,
            # which is what offloading is to avoid (2026-11, "Rehearsals" in benchmarks/RESULTS.md).
            # Delete when XLA schedules copies from the host by memory.
            if changes:
                part, _ = jax.lax.optimization_barrier((part, changes[-1]))
            stacked = logical_axes(gradient)[:1] == ("layers",)
            change, part = (_update_layers if stacked else _update)(rule, gradient, part, value)
            changes.append(change)
            states.append(part)
        state = jax.tree.map(join, state, *states, is_leaf=is_moments)
        return jax.tree.unflatten(structure, changes), state

    return optax.GradientTransformation(rule.init, update)


def moved_to(tree: PyTree, memory: Literal["Host", "Device"]) -> PyTree:
    """Move the arrays of a tree within a program to the memory of the host or of the device."""
    space = jax.memory.Space.Host if memory == "Host" else jax.memory.Space.Device
    return jax.tree.map(lambda array: jax.device_put(array, space), tree)


def _update(
    rule: optax.GradientTransformation, gradient: Variable, state: PyTree, value: Variable
) -> tuple[Variable, PyTree]:
    """Return a parameter's update and its state, in which lists hold what lies at the host."""
    (change,), state = rule.update([gradient], moved_to(state, "Device"), [value])
    return change, jax.tree.map(_to_host, state, is_leaf=_is_list)


def _update_layers(
    rule: optax.GradientTransformation, gradient: Variable, state: PyTree, value: Variable
) -> tuple[Variable, PyTree]:
    """Update a parameter stacked over layers, so that one layer's moments are on the device."""

    def body(index: jax.Array, carry: tuple[Variable, PyTree]) -> tuple[Variable, PyTree]:
        change, in_host_memory = carry

        def take(node: Variable) -> Variable:
            array = node.get_value()
            if not isinstance(array, optax.MaskedNode):
                array = jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
            return node.replace(array, out_sharding=logical_axes(node)[1:])

        def put(node: Variable, layer: Variable) -> Variable:
            if isinstance(node.get_value(), optax.MaskedNode):
                return node
            array = jax.lax.dynamic_update_index_in_dim(
                node.get_value(), layer.get_value(), index, 0
            )
            return node.replace(array)

        def take_moments(node: PyTree, current: PyTree) -> PyTree:
            # Counts are those from before the update, for all layers.
            return [take(current[0])] if _is_list(node) else node

        def put_moments(current: PyTree, layer: PyTree) -> PyTree:
            return [put(current[0], _to_host(layer)[0])] if _is_list(current) else layer

        layer_state = jax.tree.map(take_moments, state, in_host_memory, is_leaf=_is_list)
        (layer_change,), layer_state = rule.update(
            [take(change)], moved_to(layer_state, "Device"), [take(value)]
        )
        in_host_memory = jax.tree.map(put_moments, in_host_memory, layer_state, is_leaf=_is_list)
        return put(change, layer_change), in_host_memory

    layers = gradient.get_value().shape[0]
    result: tuple[Variable, PyTree] = jax.lax.fori_loop(0, layers, body, (gradient, state))
    return result


def _is_list(node: PyTree) -> bool:
    return isinstance(node, list)


def _to_host(node: PyTree) -> PyTree:
    return moved_to(node, "Host") if _is_list(node) else node
