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
    assert "stale" not in text and "| B1, 2048 tokens, blocks of 16 | 3,000 | 4,000 | – | 0.75 |" in text
    assert text.startswith("a\n<!-- table: paged_decode -->\n") and text.endswith("\n<!-- end of table -->\nb\n")


def test_readme_holds_the_committed_results():
    readme = CHECKOUT / "README.md"
    if not readme.is_file():
        pytest.skip("no checkout")
    text = readme.read_text(encoding="utf-8")
    assert tables.filled(text, CHECKOUT / "eval" / "results") == text, (
        "run python -m hf_paged_flash.eval.tables --write"
    )
