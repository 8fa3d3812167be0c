"""Describes devices that this machine lacks to XLA's compilers, to compile for them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
from jax.experimental import topologies

from tunelang.compiler.layout.hardware import Devices
from tunelang.runtime.errors import MissingExtraError

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # or it asks a metadata server that is not there
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any that it knows, or it warns; the topology counts
}
_GPUS = {
    # name: capability, cores, shared memory of a core, L2 cache, clock in GHz
    "a100": ((8, 0), 108, 167936, 41943040, 1.41),
    "h100": ((9, 0), 132, 233472, 52428800, 1.98),
    "h200": ((9, 0), 132, 233472, 52428800, 1.98),
    "b200": ((10, 0), 148, 233472, 132644864, 1.96),
}
"""Facts of a device for XLA's GPU compiler (CUDA's device queries, NVIDIA's white papers)."""


def compilable(devices: Devices) -> Sequence[jax.Device]:
    """Return devices to compile for.

    Those of a TPU topology need libtpu, those of NVIDIA the plug-in for CUDA; simulated ones need
    nothing. Raises `MissingExtraError` where these are not installed.
    """
    if devices.here:
        return jax.devices()[: devices.count]
    if devices.chip.platform == "tpu":
        return _tpu(devices)
    return _gpu(devices)


def _tpu(devices: Devices) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError("tpu", "on")
    name = devices.chip.name
    shape = [*devices.shape, *[1] * (3 - len(devices.shape))]
    bounds = [min(size, most) for size, most in zip(shape, (2, 2, 1), strict=True)]
    more: dict[str, str | int] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if devices.groups > 1:
        more["num_slices"] = devices.groups
    with _environment(_TPU_ENVIRONMENT):
        topology = topologies.get_topology_desc(
            f"{name}:{'x'.join(map(str, devices.shape))}",
            platform="tpu",
            chips_per_host_bounds=bounds,
            **more,
        )
    return list(topology.devices)


def _gpu(devices: Devices) -> Sequence[jax.Device]:
    needed = ("jax_cuda13_plugin", "nvidia", "nvidia.cudnn")
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise MissingExtraError("cuda", "on")
    group = devices.count // devices.groups
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=target(devices),
        topology=f"1x{devices.groups}x{group}",
    )
    return list(topology.devices)


def target(devices: Devices) -> str:
    """Return the target configuration of a GPU, as text, for XLA's compiler for CUDA."""
    (major, minor), cores, shared, cache, clock = _GPUS[devices.chip.name]
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(devices.chip.bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {int(devices.chip.memory / 0.9)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {devices.chip.name.upper()}"
"""


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
