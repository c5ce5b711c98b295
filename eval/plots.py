"""README's pictures, made from the rows in eval/results.

Attention's TFLOP/s by sequence length, forward and backward; and what K/V caches reserve over time, by workload.

python -m hf_paged_flash.eval.plots            # writes eval/assets/flash_attention.svg and eval/assets/memory.svg
"""

from pathlib import Path
from typing import Annotated

import typer

from hf_paged_flash.eval.report import launch
from hf_paged_flash.eval.tables import IMPLEMENTATIONS, attention_rows, memory_rows

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Colours that people with any colour vision tell apart (Okabe and Ito), and a mark as well.
STYLES = {
    "paged_flash": {"color": "#D55E00", "marker": "o", "linewidth": 2.2},
    "paged_flash_portable": {"color": "#E69F00", "marker": "s"},
    "sdpa_fa2": {"color": "#56B4E9", "marker": "^"},
    "sdpa_cudnn": {"color": "#009E73", "marker": "D"},
    "flex": {"color": "#CC79A7", "marker": "v"},
}
CACHES = {"dynamic": "#56B4E9", "static": "#CC79A7", "paged": "#D55E00"}
PASSES = {"fwd": "forward", "bwd": "backward"}
HEAD_DIMS = (128, 64)

Series = dict[tuple[str, int], dict[str, list[tuple[int, float]]]]


def series_of(rows: list[dict]) -> Series:
    """{(pass, head_dim): {implementation: [(length, TFLOP/s), …]}}, causal, of batches of as many tokens.

    The number of tokens is that of the longest row among the dense causal batches of 32/8 heads and of width 128 or
    64; others are left out.
    """
    wanted = {"causal": True, "h": 32, "hk": 8}
    chosen = [
        row
        for row in rows
        if row["case"]["d"] in HEAD_DIMS
        and "packed" not in row["case"]
        and all(row["case"][name] == value for name, value in wanted.items())
    ]
    tokens = max((row["case"]["s"] for row in chosen), default=0)
    series: Series = {}
    for row in chosen:
        case = row["case"]
        if case["b"] * case["s"] == tokens:
            points = series.setdefault((case["pass"], case["d"]), {}).setdefault(row["impl"], [])
            points.append((case["s"], row["value"]))
    return {panel: {impl: sorted(points) for impl, points in lines.items()} for panel, lines in series.items()}


def draw(rows: list[dict], path: Path) -> None:
    """Writes the picture of attention's speed, an SVG that names the runs it shows, to `path`."""
    pyplot = _pyplot()
    series = series_of(rows)
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    drawn = {}
    for line, head_dim in zip(axes, HEAD_DIMS, strict=True):
        for axis, (direction, name) in zip(line, PASSES.items(), strict=True):
            axis.set_title(f"{name}, head_dim {head_dim}")
            axis.grid(alpha=0.3)
            axis.set_xscale("log", base=2)
            for impl, style in STYLES.items():
                if points := series.get((direction, head_dim), {}).get(impl):
                    (drawn[impl],) = axis.plot(*zip(*points, strict=True), **style, markersize=4)
    lengths = sorted({length for lines in series.values() for points in lines.values() for length, _ in points})
    axes[0, 0].set_xticks(lengths, [str(length) for length in lengths])
    axes[0, 0].minorticks_off()
    axes[0, 0].set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("sequence length (as many tokens in every batch)")
    figure.supylabel("TFLOP/s, bf16, causal, 32/8 heads")
    figure.suptitle(", ".join(dict.fromkeys(row["gpu"] for row in rows)))
    figure.legend(drawn.values(), [IMPLEMENTATIONS[impl] for impl in drawn], loc="outside lower center", ncols=5)
    _save(figure, rows, path)


def draw_memory(rows: list[dict], path: Path) -> None:
    """Writes the picture of K/V memory over time to `path`: what lies above the grey is waste."""
    pyplot = _pyplot()
    series: dict[str, dict[str, list]] = {}
    for row in rows:
        series.setdefault(row["case"]["title"], {})[row["impl"]] = row["value"]
    lines = -(-len(series) // 2)
    figure, axes = pyplot.subplots(lines, 2, figsize=(9, 2.6 * lines), layout="constrained", squeeze=False)
    drawn = {}
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    for axis, (title, by_cache) in zip(axes.flat, series.items(), strict=False):
        axis.set_title(title, fontsize=8)
        axis.grid(alpha=0.3)
        for cache, color in CACHES.items():
            if cache in by_cache:
                forwards, reserved, needed = zip(*by_cache[cache], strict=True)
                (drawn[cache],) = axis.plot(forwards, reserved, color=color, linewidth=1.6)
                grey = {"color": "#BBBBBB", "linewidth": 0}
                drawn.setdefault("needed", axis.fill_between(forwards, 0, needed, **grey, zorder=0))
        axis.set_ylim(bottom=0)
    names = IMPLEMENTATIONS | {"needed": "tokens that are still needed, once"}
    for axis in axes[-1]:
        axis.set_xlabel("forward")
    figure.supylabel("GiB of K/V reserved, Llama-3.1-8B's shape")
    figure.legend(drawn.values(), [names[name] for name in drawn], loc="outside lower center", ncols=4)
    _save(figure, rows, path)


def _pyplot():
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "hf_paged_flash", "font.size": 9}
    from matplotlib import pyplot

    return pyplot


def _save(figure, rows: list[dict], path: Path) -> None:
    runs = ", ".join(dict.fromkeys(row["run"] for row in rows))
    figure.savefig(path, metadata={"Description": f"runs {runs}", "Date": None})
    _pyplot().close(figure)


def timelines(folder: Path) -> list[dict]:
    """The rows that the picture of K/V memory shows."""
    return [row for row in memory_rows(folder, counted=True) if row["metric"] == "gib_over_time"]


@app.command()
def main(
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: eval/assets")] = None,
) -> None:
    """Draws attention's speed by sequence length and K/V memory over time from the newest results of a checkout."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / "pyproject.toml").is_file():
        raise FileNotFoundError(f"no results beside {folder}: run this in a checkout")
    out = out or folder / "assets"
    attention = [row for row in attention_rows(folder / "results") if "packed" not in row["case"]]
    draw(attention, out / "flash_attention.svg")
    draw_memory(timelines(folder / "results"), out / "memory.svg")
    print(out / "flash_attention.svg", out / "memory.svg", sep="\n")


if __name__ == "__main__":
    launch(app)
