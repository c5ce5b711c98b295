"""README's tables of generate(), from the rows of its benchmark."""

import json
from collections.abc import Callable
from pathlib import Path

from hf_paged_flash.eval.table_parts import IMPLEMENTATIONS, NoRows, markdown, newest_runs, source

FIRST_TOKEN = ("ttft_cold_ms", "ttft_process_ms", "ttft_ms")

Variant = tuple[str, str | None]


def _without_mode(case: dict) -> str:
    return json.dumps({name: value for name, value in case.items() if name != "compile"})


def generate_rows(folder: Path, wanted: Callable[[dict], bool]) -> list[dict]:
    """The rows with a model that are `wanted`: for each case, in any mode of torch.compile, those of its last run."""
    rows = newest_runs(folder / "generate.jsonl", lambda row: _without_mode(row["case"]))
    chosen = [row for row in rows if "model" in row["case"] and wanted(row)]
    if not chosen:
        raise NoRows("generate")
    return chosen


def batch_rows(folder: Path) -> list[dict]:
    """The rows of batches: prefill, steps, memory."""
    return generate_rows(folder, lambda row: row["metric"] not in (*FIRST_TOKEN, "step_ms"))


def by_variant(rows: list[dict]) -> dict[str, dict[Variant, dict[str, float]]]:
    """{case, as JSON and without its mode: {(implementation, mode): {metric: value}}}."""
    cases: dict[str, dict[Variant, dict[str, float]]] = {}
    for row in rows:
        variants = cases.setdefault(_without_mode(row["case"]), {})
        variants.setdefault((row["impl"], row["case"]["compile"]), {})[row["metric"]] = row["value"]
    return cases


def variant_name(variant: Variant) -> str:
    impl, mode = variant
    return IMPLEMENTATIONS[impl] if mode is None else f"{IMPLEMENTATIONS[impl]}, compiled ({mode})"


def batch_name(case: dict) -> str:
    if case["prompt"] == "ragged":
        return f"{case['model']}, {case['b']} ragged prompts of {case['tokens']:,} tokens in all"
    return f"{case['model']}, B{case['b']}, prompt {case['prompt']:,}"


def generate(folder: Path) -> str:
    """Prefill, steps and memory of generate(), a row a batch and implementation."""
    rows = batch_rows(folder)
    table = []
    for case, variants in by_variant(rows).items():
        peer = variants.get(("dynamic_sdpa", None), {})
        for variant, values in variants.items():
            what = [batch_name(json.loads(case)), variant_name(variant)]
            if "out_of_memory" in values:
                table.append([*what, "out of memory", *["–"] * 6])
                continue
            step = values["decode_ms"]
            others = values.get("read_ms"), values.get("graph_ms"), peer.get("decode_ms")
            table.append([
                *what,
                f"{values['prefill_ms']:,.0f}",
                f"{step:.2f}",
                *(f"{step / other:.2f}" if other else "–" for other in others),
                f"{values['tok_s']:,.0f}",
                f"{values['peak_gib']:.2f}" if "peak_gib" in values else "–",
            ])  # fmt: skip
    heading = ["bf16, greedy", "generate() with", "prefill, ms", "step, ms", "× floor", "× its graph alone",
               "× DynamicCache's", "tokens/s", "GiB over the weights"]  # fmt: skip
    measured = [any(row[i] != "–" for row in table) for i in range(len(heading))]
    heading, *table = ([cell for cell, shown in zip(row, measured, strict=True) if shown] for row in [heading, *table])
    floor = "Floor: the bytes of weights and K/V over the bandwidth of a copy. " if "× floor" in heading else ""
    return f"{markdown(heading, table)}\n\n{floor}{source(rows)}"


def first_token(folder: Path) -> str:
    """Milliseconds to the first token: of a process, warm, and with a cached prefix."""
    rows = generate_rows(folder, lambda row: row["metric"] in FIRST_TOKEN)
    table = []
    for case, variants in by_variant(rows).items():
        fields = json.loads(case)
        prefix = f", {fields['prefix']:,} of them cached" if fields.get("prefix") else ""
        for variant, values in variants.items():
            what = [f"{fields['model']}, prompt of {fields['prompt']:,}{prefix}", variant_name(variant)]
            table.append([*what, *(f"{values[name]:,.0f}" if name in values else "–" for name in FIRST_TOKEN)])
    heading = ["first token, ms", "generate() with", "new process, no kernel on disk", "new process", "warm"]
    return f"{markdown(heading, table)}\n\n{source(rows)}"
