"""Text to evaluate on, and its strided windows."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from hf_paged_flash.errors import ArgumentError

# What `datasets.load_dataset` calls the builder of a local file.
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_text(source: str | None = None, *, name: str | None = None, split: str = "test", column: str = "text") -> str:
    """The whole text of a data set as one string.

    Args:
        source: A local file (.txt, .jsonl, .json, .parquet), a data set's name on the hub, or None for the held-out
            text that is shipped with the package.
        name: The hub data set's configuration, such as "wikitext-2-raw-v1".
        split: The hub data set's split.
        column: The column of jsonl, json, parquet and hub data that holds the text; rows are joined by a blank line,
            as is usual for wikitext. The lines of a text file are joined as they were.

    Raises:
        ArgumentError: a local file of another kind, or without that column.
    """
    if source is None:
        from hf_paged_flash.eval import assets

        # The package's own asset is read as it is: `datasets` is needed for other people's data only.
        return assets.heldout_path().read_text(encoding="utf-8")

    import datasets

    path = Path(source)
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ArgumentError(f"`data` must be a file of {', '.join(BUILDERS)} or a hub name, got {source!r}")
        builder = BUILDERS[path.suffix]
        rows = datasets.load_dataset(builder, data_files=str(path), split="train")
    else:
        builder = None
        rows = datasets.load_dataset(source, name, split=split)
    column = "text" if builder == "text" else column
    if column not in rows.column_names:
        raise ArgumentError(f"`column` must be one of {', '.join(rows.column_names)}, got {column!r}")
    return ("\n" if builder == "text" else "\n\n").join(rows[column])


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of the text; tokens from `first_scored` on are scored, those before it are context."""

    begin: int
    end: int
    first_scored: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def context(self) -> int:
        """Tokens at the window's start that are not scored; at least one."""
        return self.first_scored - self.begin

    @property
    def scored(self) -> int:
        return self.end - self.first_scored


def strided_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Windows of `window` tokens, `stride` apart, that score every token but the first exactly once.

    Each scored token sees at least `window - stride` tokens of context, once that many have been read.

    Raises:
        ArgumentError: `window` < 2, or `stride` not in [1, window - 1]: a window that begins where the last one ended
            could not score its own first token.
    """
    if window < 2:
        raise ArgumentError(f"`window` must be at least 2 tokens, got {window}")
    if not 1 <= stride < window:
        raise ArgumentError(f"`stride` must be between 1 and window - 1 = {window - 1}, got {stride}")
    windows: list[Window] = []
    first_scored = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        if end <= first_scored:
            break
        windows.append(Window(begin, end, first_scored))
        first_scored = end
    return windows


def batched(windows: list[Window], batch_size: int) -> list[list[Window]]:
    """Batches of windows of equal length and context, in order, so that a batch is one rectangle of tokens."""
    if batch_size < 1:
        raise ArgumentError(f"`batch_size` must be at least 1, got {batch_size}")
    batches = []
    for _, group in groupby(windows, key=lambda window: (window.length, window.context)):
        alike = list(group)
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return batches
