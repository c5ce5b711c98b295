"""Fixtures of the tests of decode graphs on the CPU."""

import pytest

from hf_paged_flash import backend
from hf_paged_flash.generation import decode_graph
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
