"""The command `perplexity`: what it prints, writes and returns, on one process and on two."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.eval import assets, perplexity

OPTIONS = ["--window", "64", "--max-tokens", "300", "--device", "cpu", "--dtype", "float32", "--chunk", "17"]


def run(*arguments):
    return CliRunner().invoke(perplexity.app, [str(a) for a in arguments])


def last_line(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


def test_default_comparison(tiny_model_path, text_file, tmp_path):
    report, out = tmp_path / "report.json", tmp_path / "results"
    result = run(tiny_model_path, "--data", text_file, *OPTIONS, "--json", report, "--out", out)
    assert result.exit_code == 0, result.output
    summary = last_line(result.stdout)
    assert summary == json.loads(report.read_text())
    assert summary["passed"] and summary["dtype"] == "float32" and summary["tolerance"] == 1e-4
    pairs = [(row["way"], row["implementation"]) for row in summary["results"]]
    names = ("eager", "sdpa", "paged_flash")
    assert pairs == [(way, name) for way in ("forward", "chunked", "decode") for name in names]
    assert all(row["tokens"] == 299 and abs(row["delta_ppl"]) <= 1e-4 for row in summary["results"])
    counted = summary["counters"]
    assert sum(counted["kernel"].values()) + sum(counted["reference"].values()) > 0 and not counted["dense_gather"]
    rows = [json.loads(line) for line in (out / "perplexity.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(pairs) and {row["metric"] for row in rows} == {"ppl", "max_abs_dlogit"}
    assert rows[0]["case"] == {"model": tiny_model_path.name, "dtype": "float32", "way": "forward"}


def test_beyond_the_tolerance_is_exit_status_1(tiny_model_path, text_file):
    result = run(
        tiny_model_path, "--data", text_file, *OPTIONS, "--implementations", "eager,sdpa", "--ways", "forward",
        "--tolerance", "-1",
    )  # fmt: skip
    assert result.exit_code == 1
    assert last_line(result.stdout)["passed"] is False


def test_default_text_is_the_shipped_one(tiny_model_path, text_file, monkeypatch):
    monkeypatch.setattr(assets, "model_path", lambda: tiny_model_path)
    monkeypatch.setattr(assets, "heldout_path", lambda: text_file)
    # Data of ours needs no `datasets`.
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run(*OPTIONS, "--implementations", "eager", "--ways", "forward")
    assert result.exit_code == 0, result.output
    assert last_line(result.stdout)["model"] == "tiny_python"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "0"], "`stride` must be between 1 and window - 1 = 63, got 0"),
        (["--ways", "sideways"], "`ways` must be some of forward, chunked, decode"),
        (["--implementations", ","], "`implementations` must be at least one name"),
        (["--stride", "64"], "`stride` must be between 1 and window - 1 = 63, got 64"),
        (["--max-tokens", "1"], "at least 2 tokens"),
    ],
)
def test_bad_options_name_the_argument(options, message, tiny_model_path, text_file):
    result = run(tiny_model_path, "--data", text_file, *OPTIONS, "--implementations", "eager", *options)
    assert isinstance(result.exception, ArgumentError) and message in str(result.exception)


def test_ours_asked_for_and_not_run_is_an_error(tiny_model_path, text_file, monkeypatch):
    import hf_paged_flash
    from hf_paged_flash.backend import Counters

    monkeypatch.setattr(hf_paged_flash, "counters", lambda: Counters())
    result = run(tiny_model_path, "--data", text_file, *OPTIONS, "--ways", "forward")
    assert "none of its operations ran" in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("window", ["64", "512"], ids=["both_work", "one_is_idle"])
def test_two_processes_agree_with_one(window, tiny_model_path, text_file, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--data", str(text_file), *OPTIONS, "--implementations", "eager,paged_flash"]
    options += ["--batch-size", "1", "--window", window]
    module = ["-m", "hf_paged_flash.eval.perplexity", str(tiny_model_path), *options]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", str(port)]
    reports = []
    for command in (module, [*launch, *module]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        # One process prints: one report.
        assert done.stdout.count('"results"') == 1
        reports.append(last_line(done.stdout)["results"])
    for one, two in zip(*reports, strict=True):
        assert one["tokens"] == two["tokens"] == 299
        assert two["ppl"] == pytest.approx(one["ppl"], rel=1e-6)


@pytest.mark.slow
def test_shipped_model_in_fp32_differs_by_less_than_1e_4():
    result = run("--device", "cpu", "--dtype", "float32", "--max-tokens", "600", "--window", "256")
    assert result.exit_code == 0, result.output
    assert last_line(result.stdout)["tolerance"] == 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-3), ("float16", 1e-3)])
def test_shipped_model_on_a_gpu(dtype, tolerance):
    result = run("--device", "cuda", "--dtype", dtype, "--max-tokens", "8192", "--window", "512")
    assert result.exit_code == 0, result.output
    summary = last_line(result.stdout)
    assert summary["tolerance"] == tolerance and not summary["counters"]["reference"]
    # On every way keys and values came through the kernels.
    assert set(summary["counters"]["kernel"]) == {"flash_forward", "paged_decode", "store_kv"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ArgumentError, match="`device` is 'cuda:1', but torch finds no GPU"):
        perplexity._settle_device("cuda:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float8"), "`dtype` must be one of auto, float32, bfloat16, float16, got 'float8'"),
        (("--implementations", "flash"), "can't be loaded with 'flash'"),
        (("--implementations", "eager,paged_flsh"), "can't be loaded with 'paged_flsh'"),
        (("no/such/model",), "no/such/model can't be loaded with 'eager'"),
    ],
)
def test_unknown_names_are_refused(options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("--device", "cpu", "--max-tokens", "64", *options)
    assert isinstance(result.exception, ArgumentError) and message in str(result.exception)
