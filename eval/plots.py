"""README's pictures, made from the rows in eval/results.

Attention's TFLOP/s by sequence length, forward and backward; what K/V caches reserve over time, by workload; and
generate()'s steps, by batch and over a long call.

python -m hf_paged_flash.eval.plots            # writes eval/assets/*.svg of what has been measured
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_paged_flash.eval.generate_tables import batch_name, batch_rows, by_variant, generate_rows, variant_name
from hf_paged_flash.eval.report import launch
from hf_paged_flash.eval.table_kinds import attention_rows, memory_rows
from hf_paged_flash.eval.table_parts import IMPLEMENTATIONS, NoRows

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
GENERATORS = {"paged_flash": "#D55E00", "dynamic_sdpa": "#56B4E9", "static_compile": "#CC79A7"}
MARKERS = {None: "o", "default": "D", "max-autotune-no-cudagraphs": "X"}  # by mode of torch.compile
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


def draw_generate(rows: list[dict], path: Path) -> None:
    """Writes the picture of decode steps by batch to `path`: a mark an implementation, and a line at the floor."""
    pyplot = _pyplot()
    cases = {batch_name(json.loads(case)): variants for case, variants in by_variant(rows).items()}
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.4 * len(cases)), layout="constrained")
    drawn = {}
    for place, variants in enumerate(cases.values()):
        for variant, values in variants.items():
            if "decode_ms" not in values:
                continue
            style = {"color": GENERATORS[variant[0]], "marker": MARKERS.get(variant[1], "s"), "linestyle": ""}
            (drawn[variant_name(variant)],) = axis.plot(values["decode_ms"], place, **style)
            if "read_ms" in values:
                drawn["floor"] = axis.vlines(values["read_ms"], place - 0.4, place + 0.4, color="black", linewidth=1.2)
    axis.set_yticks(range(len(cases)), cases)
    axis.invert_yaxis()
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.set_xlabel("ms a decode step, " + ", ".join(dict.fromkeys(row["gpu"] for row in rows)))
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3)
    _save(figure, rows, path)


def step_rows(folder: Path) -> list[dict]:
    """The rows that the picture of a long call shows."""
    return generate_rows(folder, lambda row: row["metric"] == "step_ms")


def draw_steps(rows: list[dict], path: Path) -> None:
    """Writes the picture of the time of a step by how many came before it to `path`."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    for case, variants in by_variant(rows).items():
        for variant, values in variants.items():
            style = {"color": GENERATORS[variant[0]], "linestyle": "-" if variant[1] is None else "--"}
            label = f"{batch_name(json.loads(case))}, {variant_name(variant)}"
            axis.plot(*zip(*values["step_ms"], strict=True), **style, label=label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set_xlabel("new tokens")
    axis.set_ylabel("ms a step")
    axis.legend()
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


def dense_attention(folder: Path) -> list[dict]:
    """The rows that the picture of attention's speed shows."""
    return [row for row in attention_rows(folder) if "packed" not in row["case"]]


def timelines(folder: Path) -> list[dict]:
    """The rows that the picture of K/V memory shows."""
    return [row for row in memory_rows(folder, counted=True) if row["metric"] == "gib_over_time"]


@app.command()
def main(
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: eval/assets")] = None,
) -> None:
    """Draws the pictures from the newest results of a checkout; what has not been measured is left out."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / "pyproject.toml").is_file():
        raise FileNotFoundError(f"no results beside {folder}: run this in a checkout")
    pictures = {
        "flash_attention": (dense_attention, draw),
        "memory": (timelines, draw_memory),
        "generate": (batch_rows, draw_generate),
        "generate_steps": (step_rows, draw_steps),
    }
    for name, (rows_of, picture) in pictures.items():
        try:
            rows = rows_of(folder / "results")
        except NoRows:
            continue
        path = (out or folder / "assets") / f"{name}.svg"
        picture(rows, path)
        print(path)


if __name__ == "__main__":
    launch(app)
