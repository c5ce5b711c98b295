"""Fixtures of the whole-model tests."""

import pytest

from hf_paged_flash import backend
from tests.integration.models import Pair, attentive_config, loaded_pairs
from tests.tiny_models import MODEL_TYPES


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """A function from a model type to its `Pair`, loaded once a session."""
    return loaded_pairs(attentive_config, tmp_path_factory)


@pytest.fixture(params=MODEL_TYPES)
def pair(request, load) -> Pair:
    """Each of the models in turn."""
    return load(request.param)


@pytest.fixture(autouse=True)
def backend_as_it_was():
    before = backend.backend()
    backend.reset_counters()
    yield
    backend.configure(backend=before)
    backend.reset_counters()
