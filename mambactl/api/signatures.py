"""Functions whose keywords are a command's options, for people, `help` and type checkers alike.

A function is written with the validated options as its first parameter. `with_options` gives it
the options as keywords instead. Their names, types and defaults are those of the options' class:
`help` shows them, and type checkers take them from the class itself.
"""

import os
import textwrap
from collections.abc import Callable, Sequence
from functools import reduce, wraps
from inspect import Parameter, Signature, getdoc, signature
from operator import or_
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    cast,
    overload,
)
from typing import get_args as arguments
from typing import get_origin as origin

from mambactl.api.calls import Spec
from mambactl.cli.precedence import settled
from mambactl.commands import configured
from mambactl.options import CommandConfig, StageConfig
from mambactl.stage_result import StageResult

if TYPE_CHECKING:
    from mambactl.generation.dialogue import Chat
    from mambactl.serving.running import Server

Options = ParamSpec("Options")
Config = TypeVar("Config", bound=CommandConfig)
WIDTH = 88


class Maker(Protocol[Options]):
    """A function that writes what its command writes."""

    def __call__(
        self,
        model: Spec,
        out: Spec | None = None,
        resume: bool = False,
        force: bool = False,
        *args: Options.args,
        **options: Options.kwargs,
    ) -> StageResult:
        """Run the command."""
        ...


class Comparison(Protocol[Options]):
    """A function that measures one model, or several in the same way."""

    def __call__(
        self,
        model: Spec,
        compare: Sequence[Spec] = (),
        *args: Options.args,
        **options: Options.kwargs,
    ) -> StageResult:
        """Run the command."""
        ...


class Bench(Protocol[Options]):
    """A function that measures a model, or what its options name in place of one."""

    def __call__(
        self, model: Spec | None = None, *args: Options.args, **options: Options.kwargs
    ) -> StageResult:
        """Run the command."""
        ...


class Meter(Protocol[Options]):
    """A function that measures a model."""

    def __call__(self, model: Spec, *args: Options.args, **options: Options.kwargs) -> StageResult:
        """Run the command."""
        ...


class Opening(Protocol[Options]):
    """A function that opens a conversation with a model."""

    def __call__(self, model: Spec, *args: Options.args, **options: Options.kwargs) -> "Chat":
        """Load the model."""
        ...


class Showing(Protocol[Options]):
    """A function that shows what its options name."""

    def __call__(self, *args: Options.args, **options: Options.kwargs) -> StageResult:
        """Run the command."""
        ...


class Serving(Protocol[Options]):
    """A function that starts a server."""

    def __call__(self, model: Spec, *args: Options.args, **options: Options.kwargs) -> "Server":
        """Start the server."""
        ...


def with_options(
    command: str, options: Callable[Options, Config]
) -> "_WithOptions[Options, Config]":
    """A decorator for a function of a command's options and of a few parameters of its own."""
    return _WithOptions(command, options)


class _WithOptions(Generic[Options, Config]):
    def __init__(self, command: str, options: Callable[Options, Config]):
        self.command = command
        # the class itself, whose parameters a checker sees as those of a call
        self.options = cast(type[CommandConfig], options)

    @overload
    def __call__(
        self, function: Callable[[Config, Spec, Spec | None, bool, bool], StageResult]
    ) -> Maker[Options]: ...

    @overload
    def __call__(
        self, function: Callable[[Config, Spec, Sequence[Spec]], StageResult]
    ) -> Comparison[Options]: ...

    @overload
    def __call__(
        self, function: Callable[[Config, Spec | None], StageResult]
    ) -> Bench[Options]: ...

    @overload
    def __call__(self, function: Callable[[Config, Spec], StageResult]) -> Meter[Options]: ...

    @overload
    def __call__(self, function: Callable[[Config, Spec], "Chat"]) -> Opening[Options]: ...

    @overload
    def __call__(self, function: Callable[[Config, Spec], "Server"]) -> Serving[Options]: ...

    @overload
    def __call__(self, function: Callable[[Config], StageResult]) -> Showing[Options]: ...

    def __call__(self, function: Callable[..., object]) -> Callable[..., object]:
        own = list(signature(function).parameters.values())[1:]
        names = {parameter.name for parameter in own}

        @wraps(function)
        def call(*args: object, **given: object) -> object:
            shared = {name: given.pop(name) for name in names & given.keys()}
            return function(keywords(self.command, given), *args, **shared)

        options = _parameters(self.options)
        shown = signature(function).return_annotation
        setattr(call, "__signature__", Signature([*own, *options], return_annotation=shown))  # noqa: B010
        call.__doc__ = f"{getdoc(function)}\n\n{_described(self.options, options)}\n"
        return call


def keywords(command: str, given: dict[str, object]) -> CommandConfig:
    """The options of a command from keywords; raises UsageError for a wrong one."""
    typed = {name: _plain(value) for name, value in given.items()}
    return configured(command, settled(command, {}, typed))


def _plain(value: object) -> object:
    """A value as the command line would give it: paths are text."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parameters(options: type[CommandConfig]) -> list[Parameter]:
    fields, inherited = options.model_fields, StageConfig.model_fields
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if fields[name].is_required() else fields[name].default,
            annotation=_bare(fields[name].annotation),
        )
        # the command's own options come first, as in its --help
        for name in sorted(fields, key=lambda name: name in inherited)
    ]


def _described(options: type[CommandConfig], parameters: Sequence[Parameter]) -> str:
    lines = [
        textwrap.fill(
            f"{each.name}: {options.model_fields[each.name].description}"
            + ("" if each.default is Parameter.empty else f" (default: {each.default!r})"),
            WIDTH,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for each in parameters
    ]
    return "\n".join(["Options, all by keyword:", "", *lines]) if lines else "It has no options."


def _bare(annotation: Any) -> Any:
    """A type as people read it, without its validators."""
    kind, parts = origin(annotation), arguments(annotation)
    if kind is Annotated:
        return _bare(parts[0])
    if kind in (Union, UnionType):
        return reduce(or_, map(_bare, parts))
    return list[_bare(parts[0])] if kind is list else annotation
