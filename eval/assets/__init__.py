"""What the repository ships for evaluation: a small trained language model and the held-out text it never saw."""

from pathlib import Path

_ASSETS = Path(__file__).parent


def model_path() -> Path:
    """Folder of the shipped model and tokenizer, for `from_pretrained`; raises FileNotFoundError if it is missing."""
    _existing(_ASSETS / "tiny_python" / "model.safetensors")
    return _ASSETS / "tiny_python"


def heldout_path() -> Path:
    """UTF-8 text of the standard-library modules held out of training; raises FileNotFoundError if it is missing."""
    return _existing(_ASSETS / "heldout.txt")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is missing; make it with `python eval/train_tiny.py --output {_ASSETS}`")
    return path
