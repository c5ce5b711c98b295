"""What every evaluation prints: tables for people, then one JSON line for programs."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from hf_paged_flash.errors import ArgumentError, PagedFlashError

# Wide enough for every table here where no terminal says how wide it is (pipes, logs).
PIPE_WIDTH = 130

EVAL_EXTRA = ("accelerate", "datasets", "matplotlib", "tqdm")


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def launch(app: Callable, arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs a typer app; an error that explains itself is printed without a traceback, with exit status 2."""
    try:
        app(args=arguments, prog_name=program)
    except ModuleNotFoundError as error:
        if error.name not in EVAL_EXTRA:
            raise
        print(f"error: {error.name} is not installed: pip install 'hf-paged-flash[eval]'", file=sys.stderr)
        sys.exit(2)
    except (PagedFlashError, OSError) as error:  # OSError: files, and models that transformers does not find
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def names_of(given: str, allowed: tuple[str, ...] | None, argument: str) -> list[str]:
    """The names of a comma-separated option, each once, in order.

    Raises:
        ArgumentError: none is given, or one is not among `allowed` (None allows any).
    """
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names or (allowed and not set(names) <= set(allowed)):
        choices = f"some of {', '.join(allowed)}" if allowed else "at least one name"
        raise ArgumentError(f"`{argument}` must be {choices}, separated by commas, got {given!r}")
    return names


def final_line(summary: Mapping) -> None:
    """Prints `summary` as the last line of standard output, as strict JSON (NaN and infinity become null)."""
    print(json.dumps(finite(summary), ensure_ascii=False), flush=True)


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


def print_failures(screen: Console, failures: list[dict[str, str]]) -> None:
    """Says once why an implementation did not run, and how often; `failures`: {implementation: reason} a case."""
    times = Counter(pair for failed in failures for pair in failed.items())
    for (implementation, reason), count in times.items():
        screen.print(f"– {implementation}, {count} of {len(failures)} cases: {reason}", style="yellow", markup=False)


def finite(value):
    """`value` with every NaN and infinity replaced by None, which JSON can say."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
