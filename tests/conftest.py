"""What holds for every test: no network, one seed, kernels in Triton's interpreter where there is no GPU.

    pytest                  everything; tests marked `gpu` are skipped without one
    pytest --quick          nothing marked `slow` or `gpu`, and of each test function a few of its parameter sets
"""

import os
import random
from collections import defaultdict

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it is set before anything imports one. A test that compiles kernels
# for real does so in a subprocess, without it.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

QUICK_PARAMETER_SETS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a quick pass: see tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import settings

    # Time limits of single examples say more about the machine than about the code.
    settings.register_profile("house", deadline=None, derandomize=True, database=None)
    settings.load_profile("house")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    if config.getoption("--quick"):
        chosen = set(_quick(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def _quick(items: list[pytest.Item]) -> list[pytest.Item]:
    """At most QUICK_PARAMETER_SETS items of each test function, evenly spread over its parameter sets."""
    by_function = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            by_function[item.nodeid.split("[")[0]].append(item)
    chosen = []
    for group in by_function.values():
        count = min(len(group), QUICK_PARAMETER_SETS)
        chosen += [group[i * len(group) // count] for i in range(count)]
    return chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def reference_backend():
    """The torch reference does all the work, and counts it from 0."""
    from hf_paged_flash import backend

    before = backend.backend()
    backend.configure(backend="reference")
    backend.reset_counters()
    yield
    backend.configure(backend=before)


@pytest.fixture
def precision_of_fp32():
    """What a test, or TrainingArguments in it, allows fp32 products is taken back."""
    from transformers.utils.import_utils import enable_tf32

    enable_tf32.cache_clear()  # it does nothing when it is called once more
    yield
    enable_tf32.cache_clear()
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
