"""Rows of measurements: the schema of every line, and where it came from."""

import json
import subprocess
import sys

import pytest

from hf_paged_flash.eval import results

KEYS = "bench run case impl metric value unit gpu torch triton transformers commit command date".split()


def test_rows_have_the_schema_and_are_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "commit", lambda: "c0ffee")
    first, second = (results.Recorder("paged_decode", device="cpu", folder=tmp_path / "new") for _ in range(2))
    assert first.run != second.run
    for recorder in (first, second):
        recorder.add({"b": 1}, "paged_flash", "us", 12.5)
        recorder.add({"b": 1}, "sdpa_fa2", "gbps", 900.0)
        path = recorder.write()
        recorder.write()  # what was written is not written again
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path == tmp_path / "new" / "paged_decode.jsonl"
    assert [row["run"] for row in rows] == [first.run] * 2 + [second.run] * 2
    assert all(list(row) == KEYS for row in rows)
    assert (rows[1]["unit"], rows[1]["gpu"], rows[1]["commit"]) == ("GB/s", "cpu", "c0ffee")


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="`metric` must be one of"):
        results.Recorder("memory").add({}, "paged", "speed", 1.0)


def test_command_leaves_out_where_output_goes(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(
        sys, "argv", ["/usr/bin/hf-paged-flash", "memory", "--out", "/x", "--json=/y", "--prompts", "3"]
    )
    assert results.command_line() == "hf-paged-flash memory --prompts 3"


def test_commit_says_dirty_and_takes_an_override(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "eval" / "results").mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "eval" / "results.py"))
    monkeypatch.delenv(results.COMMIT_VARIABLE, raising=False)
    found = results.commit.__wrapped__
    assert found() == "unknown"
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    clean = found()
    assert len(clean) == 40
    (tmp_path / "eval" / "results" / "memory.jsonl").write_text("{}")
    assert found() == clean
    (tmp_path / "a").write_text("2")
    assert found() == f"{clean}-dirty"
    monkeypatch.setenv(results.COMMIT_VARIABLE, "feed")
    assert found() == "feed"


def test_no_results_folder_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "eval" / "results.py"))
    with pytest.raises(FileNotFoundError, match="--out"):
        results.results_folder(record=True, out=None)
    assert results.results_folder(record=False, out=None) is None
    assert results.results_folder(record=True, out=tmp_path) == tmp_path
    (tmp_path / "pyproject.toml").touch()
    assert results.results_folder(record=True, out=None) == tmp_path / "eval" / "results"
