"""The command `hf-paged-flash`: each subcommand imports the module that does its work when it is called."""

import typer

app = typer.Typer(
    name="hf-paged-flash",
    help="FlashAttention and a paged KV cache for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Benchmarks against peers.", no_args_is_help=True)
app.add_typer(bench, name="bench")

# The options, and `--help`, belong to the module: click must pass them on as they are.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _hand_over(context: typer.Context, module: str) -> None:
    import importlib

    from hf_paged_flash.eval.report import launch

    launch(importlib.import_module(module).app, context.args, context.command_path)


@app.command(context_settings=PASSED_ON)
def demo(context: typer.Context) -> None:
    """Generate with the shipped model on paged_flash and on eager, and compare text, memory and perplexity."""
    _hand_over(context, "hf_paged_flash.eval.demo")


@app.command(context_settings=PASSED_ON)
def perplexity(context: typer.Context) -> None:
    """Compare perplexity and logits of attention implementations, in three ways through the model."""
    _hand_over(context, "hf_paged_flash.eval.perplexity")


@app.command(context_settings=PASSED_ON)
def memory(context: typer.Context) -> None:
    """Compare the K/V memory of DynamicCache, StaticCache and PagedCache by workload."""
    _hand_over(context, "hf_paged_flash.eval.memory")


@app.command(context_settings=PASSED_ON)
def coverage(context: typer.Context) -> None:
    """Try every causal language model of the installed transformers, tiny and random, against eager."""
    _hand_over(context, "hf_paged_flash.eval.coverage")


@bench.command("flash-attention", context_settings=PASSED_ON)
def bench_flash_attention(context: typer.Context) -> None:
    """Attention forward and backward against SDPA (FlashAttention-2, cuDNN) and FlexAttention."""
    _hand_over(context, "hf_paged_flash.eval.bench.flash_attention")


@bench.command("training", context_settings=PASSED_ON)
def bench_training(context: typer.Context) -> None:
    """Tokens a second and peak memory of training steps against sdpa and eager."""
    _hand_over(context, "hf_paged_flash.eval.bench.training")


@bench.command("attention-memory", context_settings=PASSED_ON)
def bench_attention_memory(context: typer.Context) -> None:
    """Peak memory of attention, forward and backward, by sequence length up to 128k."""
    _hand_over(context, "hf_paged_flash.eval.bench.attention_memory")


@bench.command("paged-decode", context_settings=PASSED_ON)
def bench_paged_decode(context: typer.Context) -> None:
    """One decode step over a block table against FlashInfer and SDPA."""
    _hand_over(context, "hf_paged_flash.eval.bench.paged_decode")


@bench.command("linear", context_settings=PASSED_ON)
def bench_linear(context: typer.Context) -> None:
    """A linear layer of one row or two, as in a decode step, against torch's."""
    _hand_over(context, "hf_paged_flash.eval.bench.linear")


@bench.command("generate", context_settings=PASSED_ON)
def bench_generate(context: typer.Context) -> None:
    """generate() with random weights, or on your own model, against DynamicCache and StaticCache."""
    _hand_over(context, "hf_paged_flash.eval.bench.generate")


@app.command()
def info() -> None:
    """Show versions, the backend, what would run on each device and why, and what is registered in transformers."""
    import platform

    import torch
    from rich.table import Table

    import hf_paged_flash
    from hf_paged_flash import backend
    from hf_paged_flash.eval.report import console
    from hf_paged_flash.eval.results import commit, versions
    from hf_paged_flash.patches import ALL_PATCHES

    table = Table(show_header=False)
    table.add_row("hf_paged_flash", f"{hf_paged_flash.__version__} (commit {commit()})")
    table.add_row("python", platform.python_version())
    for package, version in versions().items():
        table.add_row(package, version or "not installed")
    table.add_row("backend", f"{backend.backend()} (HF_PAGED_FLASH_BACKEND or configure(backend=...))")
    table.add_row("generate() on CUDA", f"{_switches()} (configure(graphs=..., fused_layers=..., compile=...))")
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        table.add_row(_device_name(device), _what_runs(device))
        if device.type == "cuda":
            table.add_row("", _hopper_kernels(device))
            table.add_row("", _elastic_pools(device))
    table.add_row("registered", _registered())
    for patch in ALL_PATCHES:
        table.add_row(f"patch {patch.target}", f"{'applied' if patch.applied else 'not applied'}: {patch.reason}")
    console().print(table)


def _switches() -> str:
    """What `configure` has switched on for `generate()`."""
    from hf_paged_flash import backend

    is_on = {"graphs": backend.graphs(), "fused layers": backend.fuses_layers()}
    told = [f"{name} {'on' if on else 'off'}" for name, on in is_on.items()]
    return ", ".join([*told, f"compiled {backend.compile_mode() or 'no'}"])


def _device_name(device) -> str:
    import torch

    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device}: {torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def _what_runs(device) -> str:
    """What attention runs on a device, and why: kernels, the reference, or an error that says what is missing."""
    import torch

    from hf_paged_flash.backend import backend, use_kernels
    from hf_paged_flash.errors import BackendError

    try:
        kernels = use_kernels(torch.empty(0, device=device))
    except BackendError as error:
        return f"nothing: {error}"
    if kernels:
        how = "Triton kernels" if device.type == "cuda" else "Triton kernels, interpreted (TRITON_INTERPRET=1)"
        return f"{how}: backend {backend()!r}"
    if backend() == "reference":
        return "the torch reference: backend 'reference'"
    why = "kernels need a CUDA device" if device.type != "cuda" else "triton cannot be imported"
    return f"the torch reference: {why}"


def _hopper_kernels(device) -> str:
    """Whether Hopper's own kernels run on a GPU, or why the portable ones do all the work."""
    from hf_paged_flash.kernels import hopper

    problem = hopper.unavailable(device)
    if problem:
        return f"Hopper's own kernels do not run: {problem}"
    head_dims = ", ".join(map(str, hopper.HEAD_DIMS))
    return f"Hopper's own kernels (Gluon): dense and packed bf16 and fp16 of head_dim {head_dims}"


def _elastic_pools(device) -> str:
    """How the block pools of a GPU grow."""
    from hf_paged_flash.cache.elastic_memory import unavailable

    problem = unavailable(device)
    if problem:
        return f"K/V pools are copied when they grow: {problem}"
    return "K/V pools grow and shrink in place (CUDA's virtual memory API)"


def _registered() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    places = {"attention": AttentionInterface, "mask": AttentionMaskInterface}
    found = {kind: "paged_flash" in interface().valid_keys() for kind, interface in places.items()}
    return ", ".join(f"paged_flash as {kind}: {'yes' if is_there else 'no'}" for kind, is_there in found.items())


def main() -> None:
    """The entry point of the command."""
    app(prog_name="hf-paged-flash")
