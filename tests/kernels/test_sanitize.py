"""The cases that run under compute-sanitizer on a GPU, here without it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels import sanitize  # noqa: E402


@pytest.mark.parametrize("name", [case.__name__ for case in sanitize.PORTABLE])
def test_cases_match_the_reference(name, device, monkeypatch):
    if device == "cpu":  # the interpreter's bf16 is none
        monkeypatch.setattr(sanitize, "DTYPE", torch.float16)
    sanitize.run_case(name, device)


def test_summaries_are_read():
    log = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 3 errors\n"
    assert sanitize.errors_found("memcheck", log) == 3
    log = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitize.errors_found("racecheck", log) == 0
    with pytest.raises(RuntimeError, match="no summary of racecheck"):
        sanitize.errors_found("racecheck", "Killed")
