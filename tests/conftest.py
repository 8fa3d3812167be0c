"""Options and fixtures of all tests; eight simulated devices, set before JAX starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.type_checks import check

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # Programs run for milliseconds here; without LLVM's passes they compile in half the time.
    " --xla_backend_optimization_level=0"
)
# A collective blocks a thread until every device has reached it, and XLA starts one thread for each
# core: on two cores, eight devices with two independent collectives would wait for ever.
os.environ.setdefault("PJRT_NPROC", "64")
_CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

install_import_hook(
    [
        f"tunelang.runtime.{name}"
        for name in ("models", "objectives", "generation", "rewards", "evals", "training")
    ],
    f"{check.__module__}.{check.__name__}",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless", action="store_true", help="rewrite expected outputs and generated pages"
    )


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite expected outputs."""
    return bool(request.config.getoption("--bless"))
