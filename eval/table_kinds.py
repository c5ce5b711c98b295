"""Each of README's tables, from the rows in eval/results to Markdown."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hf_paged_flash.eval.coverage import recorded, recorded_versions, results_file
from hf_paged_flash.eval.finding import GOOD, REFUSES, VERDICTS, WORKS, Finding
from hf_paged_flash.eval.table_parts import (
    IMPLEMENTATIONS,
    NoRows,
    all_rows,
    cell,
    markdown,
    newest_runs,
    source,
    values_by,
)

# What a table multiplies: ours, and whom it is compared with.
RATIOS = (
    ("paged_flash", "sdpa_fa2"),
    ("paged_flash", "sdpa_cudnn"),
    ("paged_flash", "flashinfer"),
    ("paged_flash_portable", "sdpa_fa2"),
)
TABLE_LENGTHS = (1024, 4096, 16384)  # the picture has those between as well


def _by_case(rows: list[dict], metric: str) -> dict[str, dict[str, float]]:
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == metric:
            cases.setdefault(json.dumps(row["case"]), {})[row["impl"]] = row["value"]
    return cases


def _columns(cases: dict[str, dict[str, float]]) -> list[str]:
    return [name for name in IMPLEMENTATIONS if any(name in values for values in cases.values())]


def _speed(cases: dict[str, dict[str, float]], label: Callable[[dict], str], what: str) -> str:
    """One row a case: each implementation's number, then ours as multiples of the peers'."""
    names = _columns(cases)
    pairs = [pair for pair in RATIOS if set(pair) <= set(names)]
    multiples = (f"{'portable ' if ours != 'paged_flash' else ''}× {IMPLEMENTATIONS[peer]}" for ours, peer in pairs)
    heading = [what, *(IMPLEMENTATIONS[name] for name in names), *multiples]
    rows = []
    for case, values in cases.items():
        numbers = [f"{values[name]:,.0f}" if name in values else "–" for name in names]
        ratios = [f"{values[ours] / values[peer]:.2f}" if {ours, peer} <= set(values) else "–" for ours, peer in pairs]
        rows.append([label(json.loads(case)), *numbers, *ratios])
    return markdown(heading, rows)


def attention_rows(folder: Path) -> list[dict]:
    """The rows of the attention benchmark: for each pass, dense or packed, those of the last run that has it."""
    return newest_runs(folder / "flash_attention.jsonl", lambda row: (row["case"]["pass"], "packed" in row["case"]))


def _one_pass(folder: Path, direction: str, what: str) -> str:
    rows = [
        row
        for row in attention_rows(folder)
        if row["case"]["pass"] == direction and row["case"]["s"] in TABLE_LENGTHS and "packed" not in row["case"]
    ]
    if not rows:
        raise NoRows(direction)

    def label(case: dict) -> str:
        mask = "causal" if case["causal"] else "full"
        return f"D{case['d']} {mask}, B{case['b']} S{case['s']}, {case['h']}/{case['hk']} heads"

    return f"{_speed(_by_case(rows, 'tflops'), label, f'{what}, bf16, TFLOP/s')}\n\n{source(rows)}"


def flash_attention(folder: Path) -> str:
    """Forward TFLOP/s of dense batches."""
    return _one_pass(folder, "fwd", "forward")


def flash_attention_backward(folder: Path) -> str:
    """Backward TFLOP/s of dense batches."""
    return _one_pass(folder, "bwd", "backward")


def packed_rows(folder: Path) -> str:
    """TFLOP/s of packed rows beside a dense batch of as many tokens and FLOPs, of one run."""
    speeds = {
        (row["run"], json.dumps(row["case"]), row["impl"]): row["value"]
        for row in all_rows(folder / "flash_attention.jsonl")
    }
    table, used = [], []
    for row in attention_rows(folder):
        case = dict(row["case"])
        packed = case.pop("packed", None)
        if packed is None:
            continue
        dense = json.dumps(case | {"b": packed["dense_b"], "s": packed["dense_s"]})
        rate = speeds.get((row["run"], dense, row["impl"]))
        if rate is None:  # left out because its result was wrong
            continue
        what = f"{'backward' if case['pass'] == 'bwd' else 'forward'} D{case['d']}, {IMPLEMENTATIONS[row['impl']]}"
        lengths = f"{case['b']} rows of {packed['shortest']} to {case['s']}"
        shape = f"B{packed['dense_b']} S{packed['dense_s']}"
        table.append([what, lengths, f"{row['value']:,.0f}", shape, f"{rate:,.0f}", f"{row['value'] / rate:.2f}"])
        used.append(row)
    if not table:
        raise NoRows("packed")
    heading = ["causal, 32/8 heads, TFLOP/s", "packed", "TFLOP/s", "dense", "TFLOP/s", "packed ÷ dense"]
    return f"{markdown(heading, table)}\n\n{source(used)}"


def training(folder: Path) -> str:
    """Tokens a second and peak memory of training steps, by length."""
    rows = newest_runs(folder / "training.jsonl")
    names = [name for name in IMPLEMENTATIONS if any(row["impl"] == name for row in rows)]
    table = []
    for (length, checkpointing), values in values_by(rows, lambda case: (case["s"], case["checkpointing"])).items():
        ours, theirs = (values.get((impl, "tokens_per_s")) for impl in ("paged_flash", "sdpa"))
        losses = [values[impl, "last_loss"] for impl in names if (impl, "last_loss") in values]
        table.append([
            f"{length:,}{', checkpointed' if checkpointing else ''}",
            *(cell(values, impl, "tokens_per_s", ",.0f") for impl in names),
            f"{ours / theirs:.2f}" if ours and theirs else "–",
            *(cell(values, impl, "peak_gib", ".1f") for impl in names),
            f"{max(losses) / min(losses) - 1:.1e}" if len(losses) > 1 else "–",
        ])  # fmt: skip
    heading = ["tokens", *(f"{IMPLEMENTATIONS[impl]}, tokens/s" for impl in names), "× sdpa"]
    heading += [*(f"{IMPLEMENTATIONS[impl]}, peak GiB" for impl in names), "losses differ by"]
    return f"{markdown(heading, table)}\n\n{source(rows)}"


def attention_memory(folder: Path) -> str:
    """MiB of attention beyond inputs, outputs and gradients, by length."""
    rows = newest_runs(folder / "attention_memory.jsonl")
    names = [name for name in IMPLEMENTATIONS if any(row["impl"] == name for row in rows)]
    passes = {"fwd": "forward", "fwd+bwd": "with backward"}
    groups = values_by(rows, lambda case: (case["s"], case["pass"]))
    table = [
        [
            f"{length:,}",
            *(
                cell(groups.get((length, direction), {}), impl, "extra_gib", ",.1f", 1024)
                for direction in passes
                for impl in names
            ),
            cell(groups.get((length, "fwd+bwd"), {}), "paged_flash", "ms", ",.1f"),
        ]
        for length in dict.fromkeys(length for length, _ in groups)
    ]
    columns = (f"{what}: {IMPLEMENTATIONS[impl]}" for what in passes.values() for impl in names)
    heading = ["MiB beyond inputs, outputs, gradients; tokens", *columns, "paged_flash with backward, ms"]
    return f"{markdown(heading, table)}\n\n{source(rows)}"


def paged_decode(folder: Path) -> str:
    """Decode GB/s of K/V read."""
    rows = newest_runs(folder / "paged_decode.jsonl")

    def label(case: dict) -> str:
        return f"B{case['b']}, {case['ctx']} tokens, blocks of {case['block_size']}"

    heading = "decode, bf16, 32/8 heads, D128, GB/s of K/V"
    table = _speed(_by_case(rows, "gbps"), label, heading)
    return f"{table}\n\nSDPA reads dense K/V, FlashInfer blocks as ours. {source(rows)}"


def linear(folder: Path) -> str:
    """Microseconds of linear layers of one row and of two, and GB/s of their weights."""
    rows = newest_runs(folder / "linear.jsonl")
    table = []
    for (count, n, k), values in values_by(rows, lambda case: (case["rows"], case["n"], case["k"])).items():
        ours, theirs = (values.get((impl, "us")) for impl in ("paged_flash", "torch"))
        table.append([
            f"{count} × {k:,} by {n:,}",
            *(
                cell(values, impl, metric, form)
                for impl in ("paged_flash", "torch")
                for metric, form in (("us", ".1f"), ("gbps", ",.0f"))
            ),
            f"{ours / theirs:.2f}" if ours and theirs else "–",
        ])  # fmt: skip
    heading = ["rows × K by N, bf16", "paged_flash, µs", "GB/s of weights", "torch, µs", "GB/s of weights", "× torch"]
    return f"{markdown(heading, table)}\n\n{source(rows)}"


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


def memory_rows(folder: Path, counted: bool) -> list[dict]:
    """The rows of the memory benchmark: for each workload, those of the last run that counted, or measured, it."""
    rows = newest_runs(folder / "memory.jsonl", lambda row: (row["gpu"] == "cpu", row["case"]["workload"]))
    return [row for row in rows if (row["gpu"] == "cpu") == counted]


def _title(case: dict) -> str:
    return case.get("title", case["workload"])


def memory(folder: Path) -> str:
    """K/V bytes that caches reserve, by workload."""
    rows = [row for row in memory_rows(folder, counted=True) if row["metric"] != "gib_over_time"]
    groups: dict[tuple, dict] = {}
    smallest = min((row["case"].get("block_size", 16) for row in rows), default=16)
    for row in rows:
        block_size = row["case"].get("block_size", smallest)
        group = groups.setdefault((_title(row["case"]), block_size), {})
        group[row["impl"], row["metric"]] = row["value"]
    if not groups:
        raise NoRows("counted")
    table = []
    for (title, block_size), values in groups.items():
        what = title if block_size == smallest else f"the same, blocks of {block_size}"
        cells = [
            f"{values[impl, 'reserved_gib']:.2f} ({values[impl, 'waste_pct']:.1f} %)"
            if (impl, "reserved_gib") in values
            else ""
            for impl in ("dynamic", "static", "paged")
        ]
        table.append([what, f"{values['paged', 'stored_gib']:.2f}", *cells])
    heading = ["K/V, GiB at most (waste over all steps)", "needed", "DynamicCache", "StaticCache"]
    return f"{markdown([*heading, f'PagedCache, blocks of {smallest}'], table)}\n\n{source(rows)}"


def memory_measured(folder: Path) -> str:
    """Memory over the weights at the peak of generate(), by workload."""
    rows = memory_rows(folder, counted=False)
    if not rows:
        raise NoRows("measured")
    table = []
    for title, values in values_by(rows, _title).items():
        needed = max((value for (_, metric), value in values.items() if metric == "stored_gib"), default=None)
        cells = []
        for impl in ("dynamic", "static", "paged"):
            of_torch = cell(values, impl, "peak_gib", ".2f")
            device = cell(values, impl, "device_gib", ".2f")
            cells.append(device if device == of_torch else f"{device} ({of_torch})")
        table.append([title, "–" if needed is None else f"{needed:.2f}", *cells])
    heading = ["generate(), device memory over the weights at its peak, GiB (torch's alone)", "K/V needed"]
    return f"{markdown([*heading, 'DynamicCache', 'StaticCache', 'PagedCache'], table)}\n\n{source(rows)}"


def _reason(finding: Finding) -> str:
    """Why a type does not work, without what is its own."""
    if finding.verdict == REFUSES:
        return finding.reason.partition(" ")[2].partition(":")[0]
    if finding.verdict in GOOD:
        return ""
    return finding.reason.partition(" (")[0].partition(". ")[0].partition(": ")[2].rstrip(":")


def coverage(folder: Path) -> str:
    """What causal-LM types do, counted by version of transformers, and which ones do not simply work."""
    tables = {version: recorded(results_file(folder, version)) for version in recorded_versions(folder)}
    if not tables:
        raise NoRows("coverage")
    counts = [Counter(finding.verdict for finding in found.values()) for _, found in tables.values()]
    rows = [
        [verdict, *(f"{count[verdict]}" for count in counts)]
        for verdict in VERDICTS
        if any(c[verdict] for c in counts)
    ]
    rows.append(["types in all", *(f"{count.total()}" for count in counts)])
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for version, (_, found) in tables.items():
        for finding in found.values():
            if finding.verdict != WORKS:
                groups.setdefault((finding.verdict, _reason(finding)), {}).setdefault(finding.model_type, []).append(
                    version
                )
    lines = []
    for verdict, reason in sorted(groups, key=lambda group: VERDICTS.index(group[0])):
        types = [
            name if len(versions) == len(tables) else f"{name} ({', '.join(versions)})"
            for name, versions in sorted(groups[verdict, reason].items())
        ]
        lines.append(f"- {verdict}{reason and f' ({reason})'}: {', '.join(types)}")
    origins = [{"run": version, **first} for version, (first, _) in tables.items()]
    heading = ["generate() of the model", *(f"transformers {version}" for version in tables)]
    return f"{markdown(heading, rows)}\n\n{chr(10).join(lines)}\n\n{source(origins)}"
