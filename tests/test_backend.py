"""backend.py: which implementation runs where, and the counters."""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from hf_paged_flash import backend as module
from hf_paged_flash.backend import backend, configure, count, counters, reset_counters, use_kernels
from hf_paged_flash.errors import ArgumentError, BackendError, CacheFullError, PagedFlashError

CPU = torch.zeros(1)
CUDA = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
OTHER = SimpleNamespace(is_cuda=False, device=torch.device("xpu", 0))


@pytest.fixture(autouse=True)
def restored_state():
    before = backend()
    module._warn_without_triton.cache_clear()
    reset_counters()
    yield
    configure(backend=before)
    module._warn_without_triton.cache_clear()
    reset_counters()


@pytest.fixture
def triton_installed(monkeypatch, request):
    monkeypatch.setattr(module, "_triton_importable", lambda: request.param)


def test_configure_sets_and_none_keeps():
    configure(backend="reference")
    configure()
    configure(backend=None)
    assert backend() == "reference"


def test_configure_names_what_is_allowed():
    with pytest.raises(ArgumentError, match="`backend` must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        configure(backend="cuda")


@pytest.mark.parametrize("value, expected", [("reference", "reference"), ("triton", "triton"), ("", "auto")])
def test_environment_variable(monkeypatch, value, expected):
    monkeypatch.setenv("HF_PAGED_FLASH_BACKEND", value)
    assert _imported_again().backend() == expected


def test_environment_variable_with_a_wrong_value(monkeypatch):
    monkeypatch.setenv("HF_PAGED_FLASH_BACKEND", "fast")
    with pytest.raises(ValueError, match="`HF_PAGED_FLASH_BACKEND` must be one of .*, got 'fast'"):
        _imported_again()


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), ("", True)])
def test_graphs_are_on_until_switched_off(monkeypatch, value, expected):
    monkeypatch.setenv("HF_PAGED_FLASH_GRAPHS", value)
    again = _imported_again()
    assert again.graphs() is expected
    again.configure(graphs=not expected)
    again.configure(backend="reference")
    assert again.graphs() is not expected
    with pytest.raises(ArgumentError, match="`graphs` must be True, False or None, got 'yes'"):
        again.configure(graphs="yes")
    with pytest.raises(ArgumentError, match="`fused_layers` must be True, False or None, got 1"):
        again.configure(fused_layers=1)


def test_graphs_variable_with_a_wrong_value(monkeypatch):
    monkeypatch.setenv("HF_PAGED_FLASH_GRAPHS", "yes")
    with pytest.raises(ArgumentError, match="`HF_PAGED_FLASH_GRAPHS` must be 0 or 1, got 'yes'"):
        _imported_again()


def _imported_again():
    spec = importlib.util.spec_from_file_location("backend_again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    # dataclasses looks a class's module up by its name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "backend_again", again)
        spec.loader.exec_module(again)
    return again


@pytest.mark.parametrize("tensor, expected", [(CPU, False), (CUDA, True), (OTHER, False)], ids=["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("triton_installed", [True], indirect=True)
def test_auto_runs_kernels_on_cuda_only(triton_installed, tensor, expected, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    configure(backend="auto")
    assert use_kernels(tensor) is expected


@pytest.mark.parametrize("triton_installed", [False], indirect=True)
def test_auto_without_triton_warns_once(triton_installed):
    configure(backend="auto")
    assert use_kernels(CPU) is False
    with pytest.warns(UserWarning, match="triton cannot be imported"):
        assert use_kernels(CUDA) is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_kernels(CUDA) is False


@pytest.mark.parametrize("triton_installed", [True], indirect=True)
def test_triton_on_the_cpu_needs_the_interpreter(triton_installed, monkeypatch):
    configure(backend="triton")
    assert use_kernels(CUDA) is True
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_kernels(CPU) is True
    with pytest.raises(BackendError, match="on xpu:0"):
        use_kernels(OTHER)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="on cpu: .*TRITON_INTERPRET=1.*'reference'"):
        use_kernels(CPU)


@pytest.mark.parametrize("triton_installed", [False], indirect=True)
@pytest.mark.parametrize("tensor", [CPU, CUDA], ids=["cpu", "cuda"])
def test_triton_without_triton_raises(triton_installed, tensor):
    configure(backend="triton")
    with pytest.raises(BackendError, match="install triton"):
        use_kernels(tensor)


@pytest.mark.parametrize("triton_installed", [True], indirect=True)
def test_reference_runs_no_kernel(triton_installed):
    configure(backend="reference")
    assert use_kernels(CUDA) is False


def test_counters_are_a_snapshot():
    count("kernel", "store_kv")
    count("kernel", "store_kv")
    count("kernel", "flash_forward")
    count("dense_gather", "cat")
    before = counters()
    count("reference", "paged_decode")
    assert before == module.Counters(kernel={"store_kv": 2, "flash_forward": 1}, dense_gather={"cat": 1})
    assert (before.kernel_total, before.reference_total, before.dense_gather_total) == (3, 0, 1)
    assert counters().reference == {"paged_decode": 1}
    reset_counters()
    assert counters() == module.Counters()
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.kernel = {}


def test_counters_lose_nothing_between_threads():
    threads = [threading.Thread(target=lambda: [count("kernel", "store_kv") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters().kernel == {"store_kv": 4000}


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(CacheFullError("no room", blocks_needed=7, blocks_free=2)))
    assert isinstance(error, PagedFlashError) and isinstance(error, RuntimeError)
    assert (str(error), error.blocks_needed, error.blocks_free) == ("no room", 7, 2)
