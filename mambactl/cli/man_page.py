"""Manual pages (roff) from the Markdown of documents, written by docutils."""

import re

from mambactl.errors import ResourceError
from mambactl.requirements import install_line
from mambactl.version import __version__

# of manuals: overviews and conventions, as git(1) keeps its guides in
MANUAL_SECTION = "7"
# links into the documents themselves lead nowhere from a manual page
_LOCAL_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")
# docutils reports below this level would go to stderr
_SILENT = 5


def man_page(topic: str, text: str) -> str:
    """The document as roff; ResourceError without the package that reads Markdown for docutils."""
    try:
        from docutils import nodes
        from docutils.core import publish_doctree, publish_from_doctree
        from myst_parser.docutils_ import Parser  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ResourceError(
            "manual pages need myst-parser, which is missing", install_line("myst_parser")
        ) from None

    def field(name: str, value: str) -> "nodes.field":
        body = nodes.field_body("", nodes.paragraph("", value))
        return nodes.field("", nodes.field_name("", name), body)

    tree = publish_doctree(
        _LOCAL_LINK.sub(r"\1", text),
        parser=Parser(),
        settings_overrides={"report_level": _SILENT, "myst_suppress_warnings": ["myst"]},
    )
    heading = tree.next_node(nodes.title)
    summary = heading.astext()
    heading[:] = [nodes.Text(f"mambactl-{topic}")]
    about = [
        field("manual section", MANUAL_SECTION),
        field("manual group", "mambactl"),
        field("version", __version__),
    ]
    tree.insert(1, [nodes.subtitle("", summary), nodes.docinfo("", *about)])
    return publish_from_doctree(
        tree, writer="manpage", settings_overrides={"output_encoding": "unicode"}
    )
