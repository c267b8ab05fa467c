"""What all tests share: the real small model, hypothesis without deadlines, the gpu marker."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

MODEL_DIR = Path(__file__).parent.parent / ".cache" / "smollm2-135m-instruct"

# Several test runs may share two cores, so the time of one example says nothing.
settings.register_profile(
    "ds_cp",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ds_cp")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests and what they import stay: collecting them without the garbage collector,
    and out of its sight afterwards, saves its walks over them."""
    from ds_cp.process import importing

    with importing(for_good=True):
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is no CUDA device. torch is asked only if some is."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device here; on a machine with one: pytest -m gpu")
            )


@pytest.fixture
def settled_heap() -> None:
    """For what measures processor time: the collector walks no module or test that is in memory by
    now, as in a server that is ready."""
    from ds_cp.process import settle_heap

    settle_heap()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an fp32 model directory, converted as ``make model`` does."""
    if not (MODEL_DIR / "config.json").is_file():
        from ds_cp.model.smollm2 import convert, wheel_file

        convert(wheel_file(), MODEL_DIR)
    return MODEL_DIR
