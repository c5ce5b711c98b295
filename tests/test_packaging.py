"""The wheel: what is in it, under which names, and what importing the package costs and starts."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"hf_paged_flash": "hf_paged_flash", "patches": "hf_paged_flash/patches", "eval": "hf_paged_flash/eval"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    """The paths in a wheel built from a copy of the sources: building in place would leave files behind."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "-w", "wheels"]
    subprocess.run(build, cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = (source / "wheels").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_module_under_the_package(wheel_names):
    modules = {
        f"{installed}/{path.relative_to(REPOSITORY / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert modules <= wheel_names
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"hf_paged_flash"}


def test_wheel_holds_the_data(wheel_names):
    assert "hf_paged_flash/py.typed" in wheel_names
    assets = [path for path in (REPOSITORY / "eval" / "assets").rglob("*") if path.is_file()]
    assert {f"hf_paged_flash/{path.relative_to(REPOSITORY).as_posix()}" for path in assets} <= wheel_names


def run_python(program: str) -> str:
    """What `program` prints, in a process of its own and outside the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_installed_under_the_package_and_nowhere_else():
    program = """
import importlib.util, hf_paged_flash.eval, hf_paged_flash.patches
print(hf_paged_flash.eval.__name__, hf_paged_flash.patches.__name__)
print(importlib.util.find_spec("eval"), importlib.util.find_spec("patches"))
"""
    assert run_python(program).splitlines() == ["hf_paged_flash.eval hf_paged_flash.patches", "None None"]


def test_import_works_without_triton_and_starts_no_cuda_context():
    program = """
import sys
sys.modules["triton"] = None
import hf_paged_flash, torch
print(torch.cuda.is_initialized())
"""
    assert run_python(program) == "False\n"


def test_import_costs_little_beside_transformers():
    # PreTrainedModel: newer transformers put off loading their model code, which is then no cost of ours
    program = """
import sys, time
from transformers import AutoModelForCausalLM, PreTrainedModel
sys.dont_write_bytecode = False  # as where it is installed: the second time it is compiled
start = time.process_time()
import hf_paged_flash
print(time.process_time() - start)
"""
    assert min(float(run_python(program)) for _ in range(3)) <= 0.2
