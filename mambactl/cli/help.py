"""The help of commands: options under headings, common ones last, as wide as the terminal."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from typer.core import TyperCommand, TyperGroup, TyperOption

from mambactl.cli.headings import COMMAND_GROUPS, ORDER, heading_of, number_of
from mambactl.present import present

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter, Parameter

# wider names of options have their text on the next line
NAME_COLUMNS = 28
# beside help, of every program
WIDEST = {"help_option_names": ["-h", "--help"], "max_content_width": 1000}
_HELP_TEXT = "show this help"


class GroupedCommand(TyperCommand):
    """A command whose help shows its options under the headings of `headings`."""

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write arguments, then options by heading."""
        _write_parameters(self.get_params(ctx), ctx, formatter)


class GroupedGroup(TyperGroup):
    """A group whose help shows its commands under the headings that they name."""

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write commands first: they are what a person looks for; then options."""
        self.format_commands(ctx, formatter)
        _write_parameters(self.get_params(ctx), ctx, formatter)

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the commands with their summaries, group by group."""
        commands = [
            (name, present(self.get_command(ctx, name))) for name in self.list_commands(ctx)
        ]
        longest = max(len(name) for name, _ in commands)
        limit = formatter.width - longest - 6
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, command in commands:
            heading = getattr(command, "rich_help_panel", None)
            heading = heading if isinstance(heading, str) else "Commands"
            row = (name.ljust(longest), command.get_short_help_str(limit).removesuffix("."))
            groups.setdefault(heading, []).append(row)
        for heading in sorted(groups, key=_rank_of_group):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])


def _rank_of_group(heading: str) -> int:
    known = list(COMMAND_GROUPS.values())
    return known.index(heading) if heading in known else len(known)


Rows = list[tuple[str, str]]


def parameters_by_heading(
    parameters: "Iterable[Parameter]", ctx: "Context"
) -> tuple[Rows, dict[str, Rows]]:
    """Arguments, and options under their headings in the order of the help: names and texts."""
    arguments: Rows = []
    sections: dict[str, Rows] = {}
    command, options = str(ctx.command.name), []
    for parameter in parameters:
        if isinstance(parameter, TyperOption):
            options.append(parameter)
        else:
            arguments += filter(None, [parameter.get_help_record(ctx)])
    for option in sorted(options, key=lambda each: number_of(command, str(each.name))):
        heading = heading_of(command, str(option.name))
        sections.setdefault(heading, []).append(_row(option, ctx))
    return arguments, {name: sections[name] for name in sorted(sections, key=ORDER.index)}


def _write_parameters(
    parameters: "Iterable[Parameter]", ctx: "Context", formatter: "HelpFormatter"
) -> None:
    arguments, sections = parameters_by_heading(parameters, ctx)
    if arguments:
        with formatter.section("Arguments"):
            formatter.write_dl(arguments, col_max=NAME_COLUMNS)
    longest = max(len(name) for rows in sections.values() for name, _ in rows)
    width = min(longest, NAME_COLUMNS)
    for heading, texts in sections.items():
        with formatter.section(heading):
            rows = [(name.ljust(width), text) for name, text in texts]
            formatter.write_dl(rows, col_max=NAME_COLUMNS)


def _row(option: TyperOption, ctx: "Context") -> tuple[str, str]:
    _, text = present(option.get_help_record(ctx))
    if option.name == "help":
        text = _HELP_TEXT
    return " ".join(_words(option, ctx)), text


def _words(option: TyperOption, ctx: "Context") -> Iterator[str]:
    """`-o, --out <str>`; a switch and its opposite are `--[no-]check`."""
    short = [name for name in option.opts if not name.startswith("--")]
    long = next(name for name in option.opts if name.startswith("--"))
    if option.secondary_opts:
        long = f"--[no-]{long.removeprefix('--')}"
    yield ", ".join([*short, long])
    if not option.is_flag:
        yield option.metavar or option.display_type(ctx)
