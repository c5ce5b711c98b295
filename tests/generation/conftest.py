"""Fixtures of the tests of decode graphs on the CPU."""

import gc

import pytest

from hf_paged_flash import backend
from hf_paged_flash.cache import elastic_memory
from hf_paged_flash.generation import decode_graph
from tests.cache.fake_driver import FakeDriver
from tests.generation.recorder import Recorders
from tests.integration.conftest import load  # noqa: F401


@pytest.fixture
def recorders(monkeypatch):
    """Graphs are switched on, recorders capture them, and there are none yet."""
    monkeypatch.setitem(decode_graph.CAPTURERS, "cpu", Recorders)
    for name in ("captured", "replayed", "elastic", "failing"):
        monkeypatch.setattr(Recorders, name, getattr(Recorders, name))
    before = backend.graphs()
    backend.configure(graphs=True)
    decode_graph._of_models.clear()
    yield Recorders
    backend.configure(graphs=before)
    decode_graph._of_models.clear()


@pytest.fixture
def elastic(recorders, monkeypatch):
    """Pools that grow in place, as on a GPU."""
    driver = FakeDriver(4096, 2**24)
    monkeypatch.setattr(elastic_memory, "driver_of", lambda device: driver)
    recorders.elastic = True
    yield driver
    decode_graph._of_models.clear()
    if driver.ranges:
        gc.collect()
    assert (driver.pages, driver.handles, driver.ranges) == (0, 0, {}), "addresses outlive the model's graphs"
