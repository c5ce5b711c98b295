"""README's tables say what the committed results say."""

import json
from pathlib import Path

import pytest

from hf_paged_flash.eval import tables

CHECKOUT = Path(tables.__file__).resolve().parent.parent
COMMON = {
    "gpu": "GPU",
    "torch": "1",
    "triton": "2",
    "transformers": "3",
    "commit": "c" * 40,
    "command": "run",
    "date": "2026-01-01T",
}


def write(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps({**COMMON, **row}) + "\n" for row in rows))


def test_the_newest_run_counts(tmp_path):
    case = {"b": 1, "ctx": 2048, "block_size": 16, "h": 32, "hk": 8, "d": 128}
    row = {"case": case, "metric": "gbps"}
    write(
        tmp_path / "paged_decode.jsonl",
        {**row, "run": "old", "impl": "paged_flash", "value": 1},
        {**row, "run": "new", "impl": "paged_flash", "value": 3000},
        {**row, "run": "new", "impl": "sdpa_cudnn", "value": 4000},
    )
    text = tables.filled("a\n<!-- table: paged_decode -->\nstale\n<!-- end of table -->\nb\n", tmp_path)
    assert "stale" not in text and "| B1, 2048 tokens, blocks of 16 | 3,000 | 4,000 | 0.75 |" in text
    assert text.startswith("a\n<!-- table: paged_decode -->\n") and text.endswith("\n<!-- end of table -->\nb\n")


def attention(impl, value, run="a", **case):
    shape = {"pass": "fwd", "b": 4, "h": 32, "hk": 8, "s": 4096, "d": 128, "causal": True}
    return {"run": run, "impl": impl, "metric": "tflops", "value": value, "case": shape | case}


def test_passes_of_attention_are_of_their_own_runs(tmp_path):
    backward = {"pass": "bwd"}
    write(
        tmp_path / "flash_attention.jsonl",
        attention("paged_flash", 300, **backward),
        attention("paged_flash_portable", 220, **backward),
        attention("sdpa_fa2", 200, **backward),
        attention("paged_flash", 1, s=8192),
        attention("paged_flash", 500),
        attention("paged_flash", 600, run="b"),
    )
    forward = tables.table_of("flash_attention", tmp_path)
    assert "| D128 causal, B4 S4096, 32/8 heads | 600 |" in forward and "S8192" not in forward
    text = tables.table_of("flash_attention_backward", tmp_path)
    heading = "paged_flash | portable kernels | SDPA FA2 | × SDPA FA2 | portable × SDPA FA2 |"
    assert f"| backward, bf16, TFLOP/s | {heading}" in text
    assert "| D128 causal, B4 S4096, 32/8 heads | 300 | 220 | 200 | 1.50 | 1.10 |" in text
    assert tables.table_of("packed_rows", tmp_path) == "Not measured yet."


def test_packed_rows_are_compared_within_their_run(tmp_path):
    packed = {"tokens": 100, "shortest": 7, "dense_b": 2, "dense_s": 50}
    write(
        tmp_path / "flash_attention.jsonl",
        attention("paged_flash", 450, b=5, s=60, packed=packed),
        attention("paged_flash", 500, b=2, s=50),
        attention("paged_flash", 900, run="later", b=2, s=50),
    )
    text = tables.table_of("packed_rows", tmp_path)
    assert "| forward D128, paged_flash | 5 rows of 7 to 60 | 450 | B2 S50 | 500 | 0.90 |" in text


def test_what_ran_out_of_memory_says_so(tmp_path):
    case = {"model": "llama-1b", "b": 1, "s": 65536, "layers": 16, "hidden_size": 2048, "checkpointing": True}
    values = {"tokens_per_s": 2000, "peak_gib": 40, "last_loss": 10.0}
    ours = [{"run": "a", "case": case, "impl": "paged_flash", "metric": m, "value": v} for m, v in values.items()]
    theirs = [{**row, "impl": "sdpa", "value": row["value"] / 2} for row in ours[:2]]
    eager = {**ours[0], "impl": "eager", "metric": "out_of_memory", "value": 1}
    write(tmp_path / "training.jsonl", *ours, *theirs, eager)
    assert (
        "| 65,536, checkpointed | 2,000 | 1,000 | out of memory | 2.00 | 40.0 | 20.0 | out of memory | – |"
        in tables.table_of("training", tmp_path)
    )
    case = {"pass": "fwd", "b": 1, "s": 131072, "h": 32, "hk": 8, "d": 128, "causal": True}
    ours = {"run": "a", "case": case, "impl": "paged_flash", "metric": "extra_gib", "value": 0.5}
    backward = {**ours, "case": case | {"pass": "fwd+bwd"}, "value": 2}
    write(
        tmp_path / "attention_memory.jsonl",
        ours, {**ours, "metric": "ms", "value": 7}, {**ours, "impl": "eager", "metric": "out_of_memory", "value": 1},
        backward, {**backward, "metric": "ms", "value": 1234.56},
    )  # fmt: skip
    text = tables.table_of("attention_memory", tmp_path)
    assert "| 131,072 | 512.0 | out of memory | 2,048.0 | – | 1,234.6 |" in text


def test_memory_by_workload(tmp_path):
    def of(run, gpu, impl, value, **more):
        case = {"workload": "w-1", "title": "one workload"} | more
        return {"run": run, "gpu": gpu, "case": case, "impl": impl, "metric": value[0], "value": value[1]}

    reserved, stored, wasted = ("reserved_gib", 4.0), ("stored_gib", 3.0), ("waste_pct", 25.0)
    write(
        tmp_path / "memory.jsonl",
        *(of("old", "cpu", "paged", (name, 9.0), block_size=16) for name, _ in (reserved, stored, wasted)),
        *(of("new", "cpu", "paged", value, block_size=16) for value in (reserved, stored, wasted)),
        *(of("new", "cpu", "paged", value, block_size=64) for value in (("reserved_gib", 5.0), stored, wasted)),
        *(of("new", "cpu", "dynamic", value) for value in (("reserved_gib", 8.0), stored, ("waste_pct", 50.0))),
        of("new", "cpu", "dynamic", ("gib_over_time", [[0, 1.0, 1.0]])),
        *(of("gpu", "GPU", "paged", value) for value in (("device_gib", 4.5), ("peak_gib", 0.5), stored)),
        of("gpu", "GPU", "static", ("out_of_memory", 1)),
    )
    text = tables.table_of("memory", tmp_path)
    assert "| one workload | 3.00 | 8.00 (50.0 %) |  | 4.00 (25.0 %) |" in text
    assert "| the same, blocks of 64 | 3.00 |  |  | 5.00 (25.0 %) |" in text
    assert "9.00" not in text
    assert "| one workload | 3.00 | – | out of memory | 4.50 (0.50) |" in tables.table_of("memory_measured", tmp_path)


def generated(run, impl, compiled=None, *, case=None, **values):
    shape = {"model": "llama-8b", "b": 1, "prompt": 512, "new": 128, "compile": compiled} | (case or {})
    return [{"run": run, "case": shape, "impl": impl, "metric": m, "value": v} for m, v in values.items()]


def test_generate(tmp_path):
    bounds = {"read_ms": 4.0, "graph_ms": 5.0}
    rest = {"prefill_ms": 30.0, "tok_s": 1500.0, "peak_gib": 0.25, **bounds}
    write(
        tmp_path / "generate.jsonl",
        {"run": "new", "case": {"bytes": 1}, "impl": "copy", "metric": "gbps", "value": 4000.0},
        *generated("old", "static_compile", decode_ms=99.0, **rest),
        *generated("new", "paged_flash", decode_ms=6.0, **rest),
        *generated("new", "paged_flash", "default", decode_ms=5.0, **rest),
        *generated("new", "dynamic_sdpa", decode_ms=24.0, **rest),
        *generated("new", "static_compile", case={"b": 32}, out_of_memory=1),
        *generated("other", "paged_flash", case={"prompt": "ragged", "tokens": 23545}, decode_ms=8.0,
                   prefill_ms=500.0, tok_s=9.0, read_ms=4.0),
    )  # fmt: skip
    text = tables.table_of("generate", tmp_path)
    assert "99" not in text and text.count("commit") == 2 and text.count("Floor: ") == 1
    assert "| llama-8b, B1, prompt 512 | paged_flash | 30 | 6.00 | 1.50 | 1.20 | 0.25 | 1,500 | 0.25 |" in text
    assert "| paged_flash, compiled (default) | 30 | 5.00 | 1.25 | 1.00 | 0.21 |" in text
    assert "| DynamicCache + sdpa | 30 | 24.00 | 6.00 | 4.80 | 1.00 | 1,500 | 0.25 |" in text
    assert "| llama-8b, B32, prompt 512 | StaticCache + compile | out of memory |" in text
    assert "ragged prompts of 23,545 tokens in all | paged_flash | 500 | 8.00 | 2.00 | – | – | 9 | – |" in text
    assert tables.table_of("first_token", tmp_path) == "Not measured yet."


def test_cases_measured_again_keep_their_places(tmp_path):
    values = {"decode_ms": 6.0, "prefill_ms": 30.0, "tok_s": 100.0}
    write(
        tmp_path / "generate.jsonl",
        *generated("all", "paged_flash", **values),
        *generated("all", "paged_flash", case={"b": 32}, **values),
        *generated("again", "paged_flash", **values | {"decode_ms": 4.0}),
    )
    text = tables.table_of("generate", tmp_path)
    assert text.index("| llama-8b, B1, prompt 512 | paged_flash | 30 | 4.00 |") < text.index("| llama-8b, B32")
    assert "6.00" not in text[: text.index("| llama-8b, B32")]


def test_linear(tmp_path):
    case = {"rows": 2, "n": 1024, "k": 4096}
    values = {"paged_flash": {"us": 5.0, "gbps": 1678.0}, "torch": {"us": 8.0, "gbps": 1049.0}}
    write(
        tmp_path / "linear.jsonl",
        *(
            {"run": "a", "case": case, "impl": impl, "metric": metric, "value": value}
            for impl, measured in values.items()
            for metric, value in measured.items()
        ),
    )
    assert "| 2 × 4,096 by 1,024 | 5.0 | 1,678 | 8.0 | 1,049 | 0.62 |" in tables.table_of("linear", tmp_path)


def test_first_token(tmp_path):
    cold = {"ttft_cold_ms": 9000.0, "ttft_process_ms": 900.0, "ttft_ms": 30.0}
    prefix = [{"prompt": 2050, "new": 1, "prefix": tokens} for tokens in (0, 2000)]
    write(
        tmp_path / "generate.jsonl",
        *generated("a", "paged_flash", case={"new": 1}, **cold),
        *generated("a", "dynamic_sdpa", case={"new": 1}, ttft_ms=40.0),
        *generated("a", "paged_flash", case=prefix[0], ttft_ms=70.0),
        *generated("a", "paged_flash", case=prefix[1], ttft_ms=20.0),
    )
    text = tables.table_of("first_token", tmp_path)
    assert "| llama-8b, prompt of 512 | paged_flash | 9,000 | 900 | 30 |" in text
    assert "| llama-8b, prompt of 512 | DynamicCache + sdpa | – | – | 40 |" in text
    assert "| llama-8b, prompt of 2,050 | paged_flash | – | – | 70 |" in text
    assert "| llama-8b, prompt of 2,050, 2,000 of them cached | paged_flash | – | – | 20 |" in text


def test_readme_holds_the_committed_results():
    readme = CHECKOUT / "README.md"
    if not readme.is_file():
        pytest.skip("no checkout")
    text = readme.read_text(encoding="utf-8")
    assert tables.filled(text, CHECKOUT / "eval" / "results") == text, (
        "run python -m hf_paged_flash.eval.tables --write"
    )
