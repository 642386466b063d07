"""Rows of the tables of an HTML page, as text."""

from html.parser import HTMLParser


class _Rows(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._kinds: list[set[str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
            self._kinds.append(set())
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._kinds[-1].add(tag)
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data

    def measured(self) -> list[list[str]]:
        """The rows that are not made of headings alone."""
        return [row for row, kinds in zip(self.rows, self._kinds, strict=True) if "td" in kinds]


def rows_of(page: str) -> list[list[str]]:
    """Cells of every row that holds numbers, with white space as single spaces."""
    parser = _Rows()
    parser.feed(page)
    return [[" ".join(cell.split()) for cell in row] for row in parser.measured()]
