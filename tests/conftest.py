"""Options and fixtures of all tests; eight simulated devices, set before JAX starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # Independent collectives in one order on all devices, or they wait for each other for ever.
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
_CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
# Eight simulated devices on few cores: programs with collectives that run side by side can starve
# each other.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless", action="store_true", help="rewrite the expected outputs in tests/ui, for review"
    )


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> bool:
    """Whether expected outputs are to be rewritten."""
    return bool(request.config.getoption("--bless"))
