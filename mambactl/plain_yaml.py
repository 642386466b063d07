"""YAML of plain values: text, numbers, truth values, nulls, lists and mappings of bounded size.

Everything else that YAML can hold (dates, sets, binary, objects of a language, aliases that grow
without end) is refused, as a damaged file is.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mambactl.bounds import YAML_BYTES, YAML_VALUES
from mambactl.errors import UsageError
from mambactl.foreign import blamed, excerpt, read_text
from mambactl.json_values import Json

if TYPE_CHECKING:
    from yaml import MappingNode, Node, ScalarNode

MEND = "mend the file"
# how YAML files of lm-evaluation-harness name Python code
FUNCTION = "!function"
_TAG = "tag:yaml.org,2002:"
_MERGE, _INT, _TEXT = _TAG + "merge", _TAG + "int", _TAG + "str"
_PLAIN = {_MERGE, _INT, _TEXT} | {_TAG + name for name in ("null", "bool", "float", "seq", "map")}
# more digits than any option can mean; to convert thousands takes Python minutes
_DIGITS = 40


def read_yaml(path: Path) -> Json:
    """The value in a YAML file; raises UsageError that names the file."""
    return parse_yaml(read_text(path, UsageError, YAML_BYTES, MEND), path)


def parse_yaml(text: str, where: Path | str) -> Json:
    """The value of a YAML text; raises UsageError that names `where`."""
    return _construct(_compose(text, where), where)


def read_with_functions(path: Path) -> tuple[Json, list[str]]:
    """The value in a YAML file, in which `!function NAME` is text, and all those names.

    Raises UsageError as `read_yaml` does.
    """
    node = _compose(read_text(path, UsageError, YAML_BYTES, MEND), path)
    names = _without_functions(node)
    return _construct(node, path), names


def _compose(text: str, where: Path | str) -> "Node | None":
    import yaml

    with blamed(where, kind=UsageError, hint=MEND):
        try:
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            problem = excerpt(" ".join(str(error).split()))
            raise UsageError(f"{where} is not valid YAML: {problem}", MEND) from None
        except RecursionError:
            raise UsageError(f"{where} is nested too deeply", MEND) from None


def _construct(node: "Node | None", where: Path | str) -> Json:
    import yaml

    if node is None:
        return None
    with blamed(where, kind=UsageError, hint=MEND):
        _Checked(where).size(node)
        return yaml.SafeLoader("").construct_document(node)


def _without_functions(node: "Node | None") -> list[str]:
    """The names behind `!function`, whose nodes become text."""
    import yaml

    names, seen, rest = [], set(), [node] if node is not None else []
    while rest:
        node = rest.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag == FUNCTION and isinstance(node, yaml.ScalarNode):
            node.tag = _TEXT
            names.append(node.value)
        elif isinstance(node, yaml.MappingNode):
            rest += [part for pair in reversed(node.value) for part in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            rest += reversed(node.value)
    return names


class _Checked:
    """Checks of a document before values are made of it: what they hold, and how many there are.

    An alias counts as often as it is used, as whatever reads the values sees it so often.
    """

    def __init__(self, where: Path | str):
        self.where = where
        self.sizes: dict[int, int] = {}

    def size(self, node: "Node") -> int:
        """Number of values that the node stands for; raises UsageError for what is not plain."""
        import yaml

        if (known := self.sizes.get(id(node))) is not None:
            if known == 0:
                raise self._refused(node, "refers to itself")
            return known
        # of nodes that are being counted
        self.sizes[id(node)] = 0
        if node.tag not in _PLAIN:
            raise self._refused(node, f"is a {_kind(node)}; put it in quotes, or leave it out")
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
            size = 1
        else:
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                parts = [part for pair in node.value for part in pair]
            size = 1 + sum(map(self.size, parts))
        if size > YAML_VALUES.most:
            raise self._refused(node, f"holds more than {YAML_VALUES}, aliases counted")
        self.sizes[id(node)] = size
        return size

    def _check_scalar(self, node: "ScalarNode") -> None:
        if node.tag == _INT and len(node.value) > _DIGITS:
            raise self._refused(node, f"is a number of {len(node.value)} digits")
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in node.value):
            raise self._refused(node, "holds a NUL, or half of a character")

    def _check_keys(self, node: "MappingNode") -> None:
        import yaml

        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._refused(key, "is a list or a mapping where a name belongs")
            if key.tag != _MERGE and key.value in seen:
                raise self._refused(key, f"is a second {excerpt(key.value)} of the same mapping")
            seen.add(key.value)

    def _refused(self, node: "Node", what: str) -> UsageError:
        mark = node.start_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}"
        return UsageError(f"{self.where}: the value at {position} {what}", MEND)


def _kind(node: "Node") -> str:
    return excerpt(node.tag.removeprefix(_TAG))
