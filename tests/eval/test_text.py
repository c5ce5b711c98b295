"""Text from files through `datasets`, and windows that score every token once."""

import json

import pytest

from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.eval.text import Window, batched, load_text, strided_windows

ROWS = ["first row\nwith a line", "", "second row"]


def test_text_file_comes_back_as_it_was(text_file, text):
    assert load_text(str(text_file)) == text.removesuffix("\n")


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_rows_are_joined_by_blank_lines(extension, tmp_path):
    path = tmp_path / f"rows.{extension}"
    if extension == "jsonl":
        path.write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS), encoding="utf-8")
    else:
        import datasets

        datasets.Dataset.from_dict({"body": ROWS}).to_parquet(str(path))
    assert load_text(str(path), column="body") == "\n\n".join(ROWS)
    with pytest.raises(ArgumentError, match="`column` must be one of body, got 'text'"):
        load_text(str(path))


def test_unknown_file_is_refused(tmp_path):
    path = tmp_path / "text.doc"
    path.write_text("x")
    with pytest.raises(ArgumentError, match="`data` must be"):
        load_text(str(path))


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride"),
    [(2, 2, 1), (100, 16, 8), (101, 16, 15), (63, 64, 32), (257, 64, 1), (128, 64, 63)],
)
def test_every_token_but_the_first_is_scored_once(num_tokens, window, stride):
    windows = strided_windows(num_tokens, window, stride)
    scored = [token for w in windows for token in range(w.first_scored, w.end)]
    assert scored == list(range(1, num_tokens))
    assert all(w.length <= window and w.context >= 1 and w.scored >= 1 for w in windows)
    # All but the last window's tokens see the promised context.
    assert all(w.context >= window - stride for w in windows[1:])


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_nothing_to_score(num_tokens):
    assert strided_windows(num_tokens, 8, 4) == []


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8), (8, 9)])
def test_windows_that_cannot_score_are_refused(window, stride):
    with pytest.raises(ArgumentError, match="must be"):
        strided_windows(100, window, stride)


def test_batches_are_rectangles_in_order():
    windows = strided_windows(103, 16, 8)
    batches = batched(windows, 4)
    assert [w for batch in batches for w in batch] == windows
    assert all(len({(w.length, w.context) for w in batch}) == 1 and len(batch) <= 4 for batch in batches)
    assert max(map(len, batches)) == 4
    assert batches[0] == [Window(0, 16, 1)]
