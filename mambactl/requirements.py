"""Requirements of this package: ranges of versions, extras, and the commands that install them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mambactl.errors import ResourceError

PACKAGE = "mambactl"


@dataclass(frozen=True)
class Extra:
    """Package that an extra installs: its name on the index, its module, its purpose."""

    name: str
    package: str
    module: str
    purpose: str
    # of pip, besides the name
    flags: str = ""

    @property
    def line(self) -> str:
        """Command that installs the extra."""
        return " ".join(filter(None, ("pip install", self.flags, f'"{PACKAGE}[{self.name}]"')))


# a package that was built against another torch than the installed one does not load
_WITH_TORCH = "--no-build-isolation"
EXTRAS = (
    Extra("eval", "lm-eval", "lm_eval", "eval --tasks"),
    Extra("plots", "matplotlib", "matplotlib", "plot, report and training curves"),
    Extra("lora", "peft", "peft", "sft --lora"),
    Extra("serve", "starlette", "starlette", "serve"),
    Extra("serve", "uvicorn", "uvicorn", "serve"),
    Extra("serve", "prometheus-client", "prometheus_client", "serve"),
    Extra("man", "myst-parser", "myst_parser", "docs --man"),
    Extra("cuda", "mamba-ssm", "mamba_ssm", "further GPU kernels", _WITH_TORCH),
    Extra("cuda", "causal-conv1d", "causal_conv1d", "further GPU kernels", _WITH_TORCH),
)
_BY_MODULE = {extra.module: extra for extra in EXTRAS}


@dataclass(frozen=True)
class Outside:
    """An installed version outside of the range that mambactl needs."""

    package: str
    installed: str
    needed: str

    @property
    def line(self) -> str:
        """Command that installs a version in the range."""
        return f'pip install "{self.package}{self.needed}"'


def purposes() -> dict[str, str]:
    """Every extra by name, and what it is for."""
    return {extra.name: extra.purpose for extra in EXTRAS}


def extra_of(module: str | None) -> Extra | None:
    """The extra that brings a module, or the package it lies in."""
    return _BY_MODULE.get((module or "").partition(".")[0])


def require_packages(modules: Iterable[str]) -> None:
    """Raise ResourceError for the first module that is not installed; none is loaded."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            extra = _BY_MODULE.get(module)
            what = f"{extra.purpose} needs {extra.package}" if extra else f"{module} is asked for"
            raise ResourceError(
                f"{what}, which is not installed",
                extra.line if extra else f"pip install {module}",
            )


def install_line(module: str) -> str:
    """The command that installs the extra of a module."""
    return _BY_MODULE[module].line


def installed(package: str) -> str | None:
    """The version of a package, None where it is missing."""
    # not needed by the help, which takes the extras from here
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def outside() -> Iterator[Outside]:
    """Packages whose version is none that mambactl needs; where it is not installed, none."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        declared = requires(PACKAGE) or []
    except PackageNotFoundError:
        return
    for need in map(Requirement, declared):
        found = installed(need.name)
        if found is None or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        if not need.specifier.contains(found, prereleases=True):
            yield Outside(need.name, found, str(need.specifier))
