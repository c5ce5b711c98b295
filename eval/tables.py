"""README's tables, made from the rows in eval/results: the newest run of each benchmark, and of each of its passes.

python -m hf_paged_flash.eval.tables            # print them
python -m hf_paged_flash.eval.tables --write    # put them between README's `<!-- table: NAME -->` marks
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from hf_paged_flash.eval.generate_tables import first_token, generate
from hf_paged_flash.eval.report import launch
from hf_paged_flash.eval.table_kinds import (
    attention_memory,
    coverage,
    flash_attention,
    flash_attention_backward,
    linear,
    memory,
    memory_measured,
    packed_rows,
    paged_decode,
    perplexity,
    training,
)
from hf_paged_flash.eval.table_parts import NoRows

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_MARK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)
TABLES = {
    made.__name__: made
    for made in (
        flash_attention, flash_attention_backward, packed_rows, paged_decode, generate, linear, first_token,
        training, attention_memory, memory, memory_measured, perplexity, coverage,
    )
}  # fmt: skip


def table_of(name: str, folder: Path) -> str:
    """The table `name` of TABLES from the results in `folder`, or a line that says there are none yet."""
    try:
        return TABLES[name](folder)
    except NoRows:
        return "Not measured yet."


def filled(text: str, folder: Path) -> str:
    """`text` with each marked table replaced by what the results in `folder` say."""

    def table(match: re.Match) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{table_of(name, folder)}\n<!-- end of table -->"

    return _MARK.sub(table, text)


@app.command()
def main(write: Annotated[bool, typer.Option("--write", help="put the tables into README.md")] = False) -> None:
    """Prints README's tables from the newest results, or writes them into README.md."""
    checkout = Path(__file__).resolve().parent.parent
    folder, readme = checkout / "eval" / "results", checkout / "README.md"
    if not readme.is_file():
        raise FileNotFoundError(f"no README.md beside {folder.parent}: run this in a checkout")
    if write:
        readme.write_text(filled(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")
    else:
        for name in TABLES:
            print(f"{name}\n\n{table_of(name, folder)}\n")


if __name__ == "__main__":
    launch(app)
