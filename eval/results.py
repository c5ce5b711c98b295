"""Measurements as JSON lines: one object a measurement, appended to `eval/results/<bench>.jsonl`.

Every row names the machine, the versions, the commit and the command it came from; the rows of one run share an id, so
that ours and a peer's can be told to be of one session. Tables and pictures are made from these files alone.
"""

import json
import os
import secrets
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

COMMIT_VARIABLE = "HF_PAGED_FLASH_COMMIT"

UNITS = {
    "tflops": "TFLOP/s",
    "us": "us",
    "ms": "ms",
    "tokens_per_s": "tokens/s",
    "first_loss": "nats/token",
    "last_loss": "nats/token",
    "gbps": "GB/s",
    "ppl": "ppl",
    "max_abs_dlogit": "logit",
    "extra_gib": "GiB",
    "peak_gib": "GiB",
    "device_gib": "GiB",
    "errors": "errors",
    "explained": "reports",
    "out_of_memory": "1 = yes",
    "reserved_gib": "GiB",
    "stored_gib": "GiB",
    "waste_pct": "%",
    "prefill_ms": "ms",
    "decode_ms": "ms",
    "read_ms": "ms",
    "replay_ms": "ms",
    "graph_ms": "ms",
    "ttft_cold_ms": "ms",
    "ttft_process_ms": "ms",
    "ttft_ms": "ms",
    "step_ms": "[token, ms]",
    "tok_s": "tokens/s",
    "torch_peak_gib": "GiB",
    "gib_over_time": "[forward, GiB reserved, GiB stored]",
}


def results_folder(record: bool, out: Path | None) -> Path | None:
    """Where `--record` and `--out` put rows: in `out`, in the checkout's `eval/results`, or nowhere (None).

    Raises:
        FileNotFoundError: `record` without `out`, outside a checkout.
    """
    if out is not None or not record:
        return out
    folder = Path(__file__).resolve().parent
    if not (folder.parent / "pyproject.toml").is_file():
        raise FileNotFoundError(
            f"no results folder: {folder} belongs to an installed package, not to a checkout; name a folder with --out"
        )
    return folder / "results"


@cache
def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it.

    `HF_PAGED_FLASH_COMMIT` overrides it, for machines that hold the files without git's metadata; else "unknown".
    """
    if override := os.environ.get(COMMIT_VARIABLE):
        return override
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
        return answer.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        # Results are what a run writes, so they do not make its own commit dirty.
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)eval/results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


@cache
def versions() -> dict[str, str | None]:
    """Installed versions of torch, triton and transformers; None for what is absent."""
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if found["torch"] is not None:
        import torch

        # The wheel's metadata may lack the local part that says which CUDA it was built for.
        found["torch"] = str(torch.__version__)
    return found


def device_name(device: str = "cuda") -> str:
    """The GPU's name, or "cpu"."""
    import torch

    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.device(device))
    return "cpu"


def command_line() -> str:
    """The command that is running, as one would type it, without the options that say where its output goes."""
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        if argument in ("--out", "--json"):
            next(arguments, None)
        elif not argument.startswith(("--out=", "--json=")):
            kept.append(argument)
    # `python -m` leaves the module's file in argv[0]; its spec still has the name that was typed.
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *kept])
    return shlex.join([Path(sys.argv[0]).name, *kept])


def origin(device: str) -> dict[str, str | None]:
    """Where a result comes from: the GPU or "cpu", versions, commit, command and time."""
    return {
        "gpu": device_name(device),
        **versions(),
        "commit": commit(),
        "command": command_line(),
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


@dataclass
class Recorder:
    """Collects the rows of one run of one benchmark and appends them to `<folder>/<bench>.jsonl`.

    Args:
        bench: The file's stem: the module's that measures.
        device: torch device that is measured; names the GPU of every row.
        folder: Where the file lies, see `results_folder`; with None rows are kept and not written.
    """

    bench: str
    device: str = "cuda"
    folder: Path | None = None
    run: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}")
    rows: list[dict] = field(default_factory=list)

    def add(self, case: dict, impl: str, metric: str, value: float | list) -> None:
        """Adds one measurement, or the points of a series; `metric` must have a unit in `UNITS`."""
        if metric not in UNITS:
            raise ValueError(f"`metric` must be one of {', '.join(UNITS)}, got {metric!r}")
        self.rows.append(
            {
                "bench": self.bench,
                "run": self.run,
                "case": case,
                "impl": impl,
                "metric": metric,
                "value": value,
                "unit": UNITS[metric],
                **origin(self.device),
            }
        )

    def write(self) -> Path | None:
        """Appends the rows and forgets them; returns the file's path, None without a folder or without rows."""
        if self.folder is None or not self.rows:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.bench}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.rows.clear()
        return path
