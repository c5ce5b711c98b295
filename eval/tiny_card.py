"""Write the model card of the small language model from what its training recorded.

    python eval/tiny_card.py eval/assets/tiny_python

Reads FOLDER/training.json (written by `train_tiny.py`), writes FOLDER/README.md.
"""

import json
import sys
from pathlib import Path

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny_python: a small language model of Python source

Made by `eval/train_tiny.py` so that perplexity and generated text mean something in tests and demos. It is far too
small to be of use as a programming assistant.

- **Architecture**: Llama, {parameters:,} parameters, {layers} layers, hidden size {hidden_size}, heads of 64 with two
  query heads to a key/value head, tied embeddings, byte-level BPE of {vocab_size} tokens, context {context}, weights
  in bfloat16.
- **Training text**: the standard library of Python {python}: {files} files, {bytes:,} bytes, {tokens:,} tokens
  (the library's own tests included: {include_tests}).
- **Held-out text**: `../heldout.txt`: {modules}; {heldout_bytes:,} bytes, {heldout_tokens:,} tokens.
- **Licences**: the weights are under Apache-2.0, like the project. Both texts are Python's, under the PSF licence in
  `../LICENSE-PSF.txt`.
- **Training**: {steps} steps of {batch_size} × {context} tokens ({epochs:.0f} epochs), AdamW, cosine schedule from
  {learning_rate:g} after 5 % warm-up, weight decay {weight_decay:g}, dropout {dropout:g} on the residual, seed {seed},
  attention `{attn_implementation}`; {seconds:.0f} s on {device}, torch {torch}, transformers {transformers}.
- **Held-out result**, the shipped weights evaluated in float32 over windows of {context} tokens: perplexity
  **{perplexity_per_token:.3f} per token**, {perplexity_per_byte:.4f} per byte ({bits_per_byte:.4f} bits per byte).
  The weights kept are those of the best evaluation below, which flatters this number slightly.

## Loss

| step | training loss | held-out loss |
|---:|---:|---:|
{loss_rows}

Every logged loss is in `training.json`.

## Samples

Unedited; sampling at temperature 0.8, top-p 0.95. The first lines of each are the prompt.

{samples}
"""


def model_card(summary: dict) -> str:
    """The text of README.md, from what `train_tiny.py` wrote into training.json."""
    options, data, heldout = summary["options"], summary["data"], summary["heldout"]
    rows, training_loss = [], float("nan")
    for log in summary["losses"]:
        training_loss = log.get("loss", training_loss)
        if "eval_loss" in log:
            rows.append(f"| {log['step']} | {training_loss:.3f} | {log['eval_loss']:.3f} |")
    values = {**summary, **options, **data, **heldout, "bytes": data["bytes"], "tokens": data["tokens"]}
    values |= {"heldout_bytes": heldout["bytes"], "heldout_tokens": heldout["tokens"], "loss_rows": "\n".join(rows)}
    values["modules"] = ", ".join(heldout["modules"])
    values["epochs"] = options["steps"] * options["batch_size"] * options["context"] / data["tokens"]
    values["samples"] = "\n\n".join(
        f"{s['way'].capitalize()}:\n\n```python\n{s['text']}\n```" for s in summary["samples"]
    )
    return CARD.format(**values)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    summary = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(model_card(summary), encoding="utf-8")
