"""The command line: every subcommand is there, arguments reach the module that works, errors are one line."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from hf_paged_flash import cli
from hf_paged_flash.backend import backend as current_backend
from hf_paged_flash.backend import configure
from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.eval.report import console, finite, launch


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), prog_name="hf-paged-flash")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["demo"], "--new-tokens"),
        (["perplexity"], "--implementations"),
        (["memory"], "--block-sizes"),
        (["coverage"], "--types"),
        (["bench", "flash-attention"], "--masks"),
        (["bench", "paged-decode"], "--block-sizes"),
        (["bench", "linear"], "--shapes"),
        (["bench", "training"], "--hidden-size"),
        (["bench", "generate"], "--static-cases"),
        (["bench", "attention-memory"], "--heads"),
    ],
)
def test_help_comes_from_the_module(command, option):
    result = run(*command, "--help")
    assert result.exit_code == 0 and option in result.stdout
    assert f"hf-paged-flash {' '.join(command)}" in result.stdout


def test_arguments_and_exit_status_pass_through(tmp_path):
    options = ["--workloads", "ragged", "--scale", "0.01", "--layers", "1", "--out", str(tmp_path)]
    assert run("memory", *options, "--tolerance", "99").exit_code == 0
    assert (tmp_path / "memory.jsonl").is_file()
    assert run("memory", *options, "--tolerance", "0").exit_code == 1
    assert run("memory", "--no-such-option").exit_code == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ArgumentError("`x` must be 1, got 2"), "error: `x` must be 1, got 2"),
        (FileNotFoundError("make it with y"), "error: make it with y"),
        (ModuleNotFoundError("No module named 'datasets'", name="datasets"), "pip install 'hf-paged-flash[eval]'"),
    ],
)
def test_errors_that_explain_themselves_have_no_traceback(error, said, capsys):
    app = typer.Typer()

    @app.command()
    def fail():
        raise error

    with pytest.raises(SystemExit) as status:
        launch(app, [])
    assert status.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "said"), [("reference", "backend 'reference'"), ("auto", "the torch reference")])
def test_info_says_what_runs_and_why(backend, said):
    before = current_backend()
    configure(backend=backend)
    try:
        result = run("info")
    finally:
        configure(backend=before)
    assert result.exit_code == 0, result.output
    assert said in result.stdout
    for line in ("torch", "triton", "transformers", "paged_flash as attention: yes", "paged_flash as mask: yes"):
        assert line in result.stdout
    assert "graphs on, fused layers on, compiled no" in " ".join(result.stdout.split())


def test_subcommands_are_imported_when_called(tmp_path):
    code = "import sys, hf_paged_flash.cli; print([m for m in sys.modules if m.startswith('hf_paged_flash.eval')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_module_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hf_paged_flash", "--help"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert all(name in done.stdout for name in ("info", "demo", "perplexity", "memory", "coverage", "bench"))


def test_final_line_is_strict_json():
    assert finite({"a": float("nan"), "b": [1.0, float("inf")], "c": "x"}) == {"a": None, "b": [1.0, None], "c": "x"}
    assert console().width >= 80
