"""What tables and pictures are made of: rows of results, those of the newest runs, and how one prints them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

IMPLEMENTATIONS = {
    "paged_flash": "paged_flash",
    "paged_flash_portable": "portable kernels",
    "sdpa": "sdpa",
    "eager": "eager",
    "sdpa_fa2": "SDPA FA2",
    "sdpa_cudnn": "SDPA cuDNN",
    "flex": "FlexAttention",
    "flashinfer": "FlashInfer",
    "dynamic": "DynamicCache",
    "static": "StaticCache",
    "paged": "PagedCache",
    "dynamic_sdpa": "DynamicCache + sdpa",
    "static_compile": "StaticCache + compile",
}


class NoRows(Exception):
    """A table or a picture whose benchmark has not been recorded yet."""


def all_rows(path: Path) -> list[dict]:
    """The rows of a results file.

    Raises:
        NoRows: there is no such file.
    """
    if not path.is_file():
        raise NoRows(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def newest_runs(path: Path, key: Callable[[dict], object] = lambda row: None) -> list[dict]:
    """For each value of `key`, the rows of the last run that has it; by default those of the file's last run.

    Values come in the order in which they were measured first, whichever of them was measured again.
    """
    rows = all_rows(path)
    last = {key(row): row["run"] for row in rows}
    places = {value: place for place, value in enumerate(last)}
    return sorted((row for row in rows if row["run"] == last[key(row)]), key=lambda row: places[key(row)])


def markdown(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, its first column left-aligned and the others right-aligned."""
    heading = list(heading)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(rows: list[dict]) -> str:
    """Where the numbers come from, a line a run."""
    lines = []
    for row in {row["run"]: row for row in rows}.values():
        versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "transformers") if row[name])
        machine = row["gpu"] if row["gpu"] != "cpu" else "CPU"
        lines.append(f"{machine}; {versions}; commit {row['commit'][:10]}; {row['date'][:10]}; `{row['command']}`")
    return "<br>\n".join(lines)


def values_by(rows: list[dict], key: Callable[[dict], object]) -> dict[object, dict[tuple[str, str], float]]:
    """{key of the case: {(implementation, metric): value}}."""
    values: dict[object, dict[tuple[str, str], float]] = {}
    for row in rows:
        values.setdefault(key(row["case"]), {})[row["impl"], row["metric"]] = row["value"]
    return values


def cell(values: dict, impl: str, metric: str, form: str, factor: float = 1) -> str:
    if (impl, metric) in values:
        return format(values[impl, metric] * factor, form)
    return "out of memory" if (impl, "out_of_memory") in values else "–"
