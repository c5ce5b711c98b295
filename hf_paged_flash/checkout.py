"""Finds `hf_paged_flash.patches` and `hf_paged_flash.eval` where Python has found a checkout's folder.

They lie beside this folder there, and in it once installed (pyproject.toml, `package-dir`). A Python that starts in
the checkout finds this folder before any installed package.
"""

import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent
if not (_folder / "patches").is_dir() and (_folder.parent / "patches" / "default_cache.py").is_file():
    sys.modules[__package__].__path__.append(str(_folder.parent))
