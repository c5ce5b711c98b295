"""Lists the packages, which pyproject.toml can't: `patches/` and `eval/` are installed under `hf_paged_flash`."""

from setuptools import find_packages, setup


def mapped(folder: str) -> list[str]:
    """The names under which a top-level `folder` and the packages in it are installed."""
    inside = [f"{folder}.{package}" for package in find_packages(folder)]
    return [f"hf_paged_flash.{package}" for package in (folder, *inside)]


setup(packages=[*find_packages(include=["hf_paged_flash", "hf_paged_flash.*"]), *mapped("patches"), *mapped("eval")])
