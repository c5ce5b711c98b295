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


def test_only_races_between_named_functions_are_explained():
    lines = {name: first + 1 for first, _, name in sanitize._functions("forward_kernel.py")}

    def report(first, *others):
        sides = [f"access at kernel+0x{i} in forward_kernel.py:{lines[x]}" for i, x in enumerate((first, *others))]
        rest = "".join(f"=========     and Write {side} [3 hazards]\n" for side in sides[1:])
        return f"========= Error: Race reported between Read {sides[0]}\n{rest}========= \n"

    explained = report("_consume", "_draw") + report("_zero_tail", "_zero_tail", "_zero_tail")
    assert sanitize.explained_races(explained) == 2
    assert sanitize.explained_races(explained + report("_zero_tail", "_zero_tail", "_consume")) == 2
    assert sanitize.explained_races(report("_consume", "_produce")) == 0
    assert sanitize.explained_races("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n") == 0
