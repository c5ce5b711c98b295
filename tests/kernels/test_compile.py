"""Every kernel compiles for GPUs that are not there, without spills in a loop and within their shared memory."""

import pytest

pytest.importorskip("triton")

from tests.kernels.compile_kernels import compile_cases, problems, representative, table  # noqa: E402

CASES = representative()
ARCHITECTURES = sorted({case.arch for case in CASES})


def compile_and_judge(cases):
    records = compile_cases(cases, jobs=1)
    print(table(records))
    assert {record["case"] for record in records} == {case.id for case in cases}
    unfit = [f"{record['case']}: {'; '.join(problems(record))}" for record in records if problems(record)]
    assert not unfit, "\n".join(unfit)
    return records


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_kernels_fit(arch):
    compile_and_judge([case for case in CASES if case.arch == arch])


def test_hopper_uses_its_tensor_cores():
    chosen = ("sm_90-flash_forward-bf16-D64-page16-causal", "sm_90-paged_decode-bf16-D64-page16-group4-q1")
    records = compile_and_judge([case for case in CASES if case.id in chosen])
    assert [record["kernel"] for record in records] == [
        "flash_forward_kernel",
        "paged_decode_kernel",
        "reduce_splits_kernel",
    ]
    assert [record["tensor_cores"] for record in records] == [True, True, False]


def test_problems_are_found():
    fit = {"arch": 75, "warnings": [], "loop_spills": 0, "spills": 8, "shared": 65536}
    assert problems(fit) == []
    assert "shared memory, sm_75 has 65536" in problems({**fit, "shared": 65537})[0]
    assert "compiled to a trap" in problems({**fit, "kernel": "dkv_kernel", "registers": 4})[0]
    assert "inside loops" in problems({**fit, "loop_spills": 1})[0]
    assert "spills 4096 bytes" in problems({**fit, "spills": 4096})[0]
    assert problems({**fit, "warnings": ["C7511: wgmma serialized"]}) == ["C7511: wgmma serialized"]
    assert problems({"arch": 75, "error": "OutOfResources"}) == ["OutOfResources"]
