"""Partitions that a layout gives to logical axes, against partitions written in the test."""

import pytest
from jax.sharding import PartitionSpec

from tunelang.runtime.sharding import make_layout


def test_logical_axes_map_to_mesh_axes():
    layout = make_layout(data=2, fsdp=2, tensor=2)
    axes = ("layers", "embed", "heads", "head_dim")
    assert layout.spec(axes, (3, 8, 4, 8)) == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert layout.spec(("batch", None), (8, 5)) == PartitionSpec(("data", "fsdp"), None)
    assert layout.batch_shards == 4


def test_axis_that_does_not_divide_is_not_split():
    layout = make_layout(tensor=8)
    spec = layout.spec(("embed", "kv_heads", "head_dim"), (8, 1, 8))
    assert spec == PartitionSpec(None, None, None)


def test_mesh_axis_of_size_one_is_left_out():
    assert make_layout(fsdp=4).spec(("vocab", "embed"), (8, 8)) == PartitionSpec(None, ("fsdp",))


def test_too_large_mesh_and_wrong_rank_are_errors():
    with pytest.raises(ValueError, match="a mesh of 16 devices, and there are 8"):
        make_layout(data=16)
    with pytest.raises(ValueError, match="axes"):
        make_layout().spec(("embed",), (2, 2))
