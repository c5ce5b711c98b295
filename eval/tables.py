"""README's tables, made from the rows in eval/results: the newest run of each benchmark.

python -m hf_paged_flash.eval.tables            # print them
python -m hf_paged_flash.eval.tables --write    # put them between README's `<!-- table: NAME -->` marks
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from hf_paged_flash.eval.report import launch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

IMPLEMENTATIONS = {
    "paged_flash": "paged_flash",
    "sdpa_fa2": "SDPA FA2",
    "sdpa_cudnn": "SDPA cuDNN",
    "flex": "FlexAttention",
    "flashinfer": "FlashInfer",
    "dynamic": "DynamicCache, padded",
    "static": "StaticCache, 4096 a row",
    "paged": "PagedCache",
}
_MARK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)


def newest_run(path: Path) -> list[dict]:
    """The rows of the last run in a results file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def newest_runs(path: Path, key: Callable[[dict], object]) -> list[dict]:
    """For each value of `key`, the rows of the last run that has it."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {key(row): row["run"] for row in rows}
    return [row for row in rows if row["run"] == last[key(row)]]


def markdown(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, its first column left-aligned and the others right-aligned."""
    heading = list(heading)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(rows: list[dict]) -> str:
    """Where the numbers come from, in one line."""
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "transformers") if first[name])
    machine = first["gpu"] if first["gpu"] != "cpu" else "counted on a CPU"
    return f"{machine}; {versions}; commit {first['commit'][:10]}; {first['date'][:10]}; `{first['command']}`"


def _by_case(rows: list[dict], metric: str) -> dict[str, dict[str, float]]:
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == metric:
            cases.setdefault(json.dumps(row["case"]), {})[row["impl"]] = row["value"]
    return cases


def _columns(cases: dict[str, dict[str, float]]) -> list[str]:
    return [name for name in IMPLEMENTATIONS if any(name in values for values in cases.values())]


def _speed(cases: dict[str, dict[str, float]], label: Callable[[dict], str], peers: list[str], what: str) -> str:
    """One row a case: each implementation's number, then ours as a multiple of the peers'."""
    names = _columns(cases)
    heading = [what, *(IMPLEMENTATIONS[name] for name in names), *(f"× {IMPLEMENTATIONS[peer]}" for peer in peers)]
    rows = []
    for case, values in cases.items():
        numbers = [f"{values[name]:,.0f}" if name in values else "–" for name in names]
        ratios = [f"{values['paged_flash'] / values[peer]:.2f}" if peer in values else "–" for peer in peers]
        rows.append([label(json.loads(case)), *numbers, *ratios])
    return markdown(heading, rows)


def flash_attention(folder: Path) -> str:
    """Forward TFLOP/s."""
    rows = newest_run(folder / "flash_attention.jsonl")

    def label(case: dict) -> str:
        mask = "causal" if case["causal"] else "full"
        return f"D{case['d']} {mask}, B{case['b']} S{case['s']}, {case['h']}/{case['hk']} heads"

    table = _speed(_by_case(rows, "tflops"), label, ["sdpa_fa2", "sdpa_cudnn"], "forward, bf16, TFLOP/s")
    return f"{table}\n\n{source(rows)}"


def paged_decode(folder: Path) -> str:
    """Decode GB/s of K/V read."""
    rows = newest_run(folder / "paged_decode.jsonl")

    def label(case: dict) -> str:
        return f"B{case['b']}, {case['ctx']} tokens, blocks of {case['block_size']}"

    heading = "decode, bf16, 32/8 heads, D128, GB/s of K/V"
    table = _speed(_by_case(rows, "gbps"), label, ["sdpa_fa2", "sdpa_cudnn"], heading)
    return f"{table}\n\nPeers read dense K/V. {source(rows)}"


def perplexity(folder: Path) -> str:
    """Perplexity three ways, by dtype and machine."""
    rows = newest_runs(folder / "perplexity.jsonl", lambda row: (row["gpu"], row["case"]["dtype"]))
    table = []
    groups: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in rows:
        group = groups.setdefault((row["gpu"], row["case"]["dtype"], row["case"]["way"]), {})
        group.setdefault(row["metric"], {})[row["impl"]] = row["value"]
    for (gpu, dtype, way), metrics in groups.items():
        ppl, dlogit = metrics["ppl"], metrics["max_abs_dlogit"]
        change = ppl["paged_flash"] / ppl["eager"] - 1
        numbers = [
            f"{ppl['eager']:.5f}",
            f"{ppl['paged_flash']:.5f}",
            f"{change:+.1e}",
            f"{dlogit['paged_flash']:.1e}",
        ]
        table.append([f"{gpu}, {dtype}, {way}", *numbers])
    heading = ["machine, dtype, way", "eager", "paged_flash", "relative difference", "largest logit difference"]
    return f"{markdown(heading, table)}\n\n{source(rows)}"


def memory(folder: Path) -> str:
    """K/V bytes of a ragged batch."""
    rows = newest_run(folder / "memory.jsonl")
    groups: dict[tuple, dict[str, float]] = {}
    for row in rows:
        groups.setdefault((row["impl"], row["case"].get("block_size")), {})[row["metric"]] = row["value"]
    table = [
        [
            IMPLEMENTATIONS[impl] + (f", blocks of {size}" if size else ""),
            f"{values['reserved_gib']:.2f}",
            f"{values['stored_gib']:.2f}",
            f"{values['waste_pct']:.1f} %",
        ]
        for (impl, size), values in groups.items()
    ]
    return f"{markdown(['K/V of 32 ragged prompts', 'reserved GiB', 'stored GiB', 'waste'], table)}\n\n{source(rows)}"


TABLES = {"flash_attention": flash_attention, "paged_decode": paged_decode, "perplexity": perplexity, "memory": memory}


def filled(text: str, folder: Path) -> str:
    """`text` with each marked table replaced by what the results in `folder` say."""

    def table(match: re.Match) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name](folder)}\n<!-- end of table -->"

    return _MARK.sub(table, text)


@app.command()
def main(write: Annotated[bool, typer.Option("--write", help="put the tables into README.md")] = False) -> None:
    """Prints README's tables from the newest results, or writes them into README.md."""
    checkout = Path(__file__).resolve().parent.parent
    folder, readme = checkout / "eval" / "results", checkout / "README.md"
    if not readme.is_file():
        raise FileNotFoundError(f"no README.md beside {folder.parent}: run this in a checkout")
    if write:
        readme.write_text(filled(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")
    else:
        for name in TABLES:
            if (folder / f"{name}.jsonl").is_file():
                print(f"{TABLES[name](folder)}\n")


if __name__ == "__main__":
    launch(app)
