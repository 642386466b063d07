"""Schemas of local task files: the columns of a row, and how lm-evaluation-harness scores it.

A file's columns decide what its rows are: `mc` (query, choices, gold), `mc+partial` (mc with
context_options and one continuation), `mc2` (query, correct, incorrect; asked for by name), `lm`
(context, continuation) and `gen` (lm with answer, aliases or subject). Parts are joined by one
space. Worked examples of a prompt are rows of the same kind.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mambactl.errors import UsageError
from mambactl.json_values import AnyObject, JsonObject

Row = JsonObject

_GREEDY = {"do_sample": False, "temperature": 0.0}
_EXACT_MATCH = {
    "metric": "exact_match",
    "aggregation": "mean",
    "higher_is_better": True,
    "ignore_case": True,
}


def _metrics(**higher_is_better: bool) -> list[JsonObject]:
    return [
        {
            "metric": name,
            "aggregation": "perplexity" if name == "perplexity" else "mean",
            "higher_is_better": better,
        }
        for name, better in higher_is_better.items()
    ]


def _spaced_continuation(row: Row) -> str:
    # the harness joins context and target of a loglikelihood request without a delimiter
    return f" {row['continuation']}"


MC = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": _metrics(acc=True, acc_norm=True),
}
# the harness's tasks of these names have no score by the length of choices
MC_PLAIN = {**MC, "metric_list": _metrics(acc=True)}
ACCURACY_ALONE = (
    "boolq",
    "commonsense_qa",
    "copa",
    "mmlu*",
    "pubmedqa",
    "race",
    "social_iqa",
    "truthfulqa_mc*",
)

# as the harness writes WinoGrande: the text is the gold index, the choices are contexts
MC_PARTIAL = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "context_options",
    "doc_to_target": "continuation",
    "metric_list": _metrics(acc=True),
}

LM = {
    "output_type": "loglikelihood",
    "doc_to_text": "context",
    "doc_to_target": _spaced_continuation,
    "fewshot_config": {"doc_to_target": "continuation"},
    "metric_list": _metrics(acc=True, perplexity=False),
}


def _both_lists(row: Row) -> list[str]:
    return [*row["correct"], *row["incorrect"]]


def _true_share(row: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    values = [value for value, _ in results]
    most = max(values)
    weights = [math.exp(value - most) for value in values]
    return {"acc": sum(weights[: len(row["correct"])]) / sum(weights)}


# TruthfulQA's second score: how much of the probability of all answers is on true ones
MC2 = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": _both_lists,
    "doc_to_target": 0,
    "process_results": _true_share,
    "metric_list": _metrics(acc=True),
}

# the last number of the answer, as the harness's flexible extraction for GSM8K
_LAST_NUMBER = {
    "function": "regex",
    "group_select": -1,
    "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
}
# the number behind the mark that solutions of GSM8K end with
_MARKED_NUMBER = {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"}


def _extraction(name: str, function: AnyObject) -> JsonObject:
    return {"name": name, "filter": [dict(function), {"function": "take_first"}]}


GEN_NUMBER = {
    "output_type": "generate_until",
    "doc_to_text": "context",
    "doc_to_target": "answer",
    "fewshot_config": {"doc_to_target": "continuation"},
    "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], **_GREEDY},
    "filter_list": [_extraction("none", _LAST_NUMBER)],
    "metric_list": [{**_EXACT_MATCH, "regexes_to_ignore": [",", r"\$", r"\.$"]}],
}

GEN_SOLUTION = {
    **GEN_NUMBER,
    "filter_list": [
        _extraction("strict-match", _MARKED_NUMBER),
        _extraction("flexible-extract", _LAST_NUMBER),
    ],
}

_STRIPPED = [
    {
        "name": "none",
        "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
    }
]

# any of several short answers, as the harness writes TriviaQA
GEN_ALIASES = {
    "output_type": "generate_until",
    "doc_to_text": "context",
    "doc_to_target": "aliases",
    "fewshot_config": {"doc_to_target": "continuation"},
    "generation_kwargs": {"until": ["\n", ".", ","], "max_gen_toks": 32, **_GREEDY},
    "filter_list": _STRIPPED,
    "metric_list": [{**_EXACT_MATCH, "ignore_punctuation": True}],
}

GEN_LINE = {
    "output_type": "generate_until",
    "doc_to_text": "context",
    "doc_to_target": "continuation",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, **_GREEDY},
    "filter_list": _STRIPPED,
    "metric_list": [_EXACT_MATCH],
}


def _is_text(value: object, _: Row) -> bool:
    return isinstance(value, str)


def _is_filled_text(value: object, _: Row) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: object, _: Row) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) and x for x in value)


def _is_choice(value: object, row: Row) -> bool:
    # bool is an int to Python, but a file that says `true` means something else
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    options = [row[name] for name in ("choices", "context_options") if name in row]
    return all(isinstance(texts, list) and 0 <= value < len(texts) for texts in options)


@dataclass(frozen=True)
class Column:
    """One column of a schema: how it is described to a user and what makes a value valid."""

    meaning: str
    valid: Callable[[object, Row], bool]


_TEXT = Column("text", _is_text)
_FILLED = Column("text that is not empty", _is_filled_text)
_TEXTS = Column("a list of texts that are not empty", _is_texts)
_MC_COLUMNS = {
    "query": _TEXT,
    "choices": _TEXTS,
    "gold": Column("the index of the right choice", _is_choice),
}
_LM_COLUMNS = {"context": _TEXT, "continuation": _FILLED}


@dataclass(frozen=True)
class Schema:
    """Columns of one kind of row, and the harness configuration that scores it."""

    name: str
    columns: dict[str, Column]
    config: JsonObject

    @property
    def metrics(self) -> list[str]:
        """Names of the scores, as `plain_name` gives them."""
        filters = [one["name"] for one in self.config.get("filter_list", [{"name": "none"}])]
        names = [metric["metric"] for metric in self.config["metric_list"]]
        return [plain_name(f"{name},{one}") for name in names for one in filters]


def plain_name(key: str) -> str:
    """The harness's `METRIC,FILTER` as METRIC, or METRIC:FILTER where answers were extracted."""
    metric, _, found = key.partition(",")
    return metric if found in ("", "none") else f"{metric}:{found}"


# the first schema whose columns are all there is taken: the narrow ones come first
SCHEMAS = (
    Schema(
        "mc+partial",
        {**_MC_COLUMNS, "context_options": _TEXTS, "continuation": _FILLED},
        MC_PARTIAL,
    ),
    Schema("mc", _MC_COLUMNS, MC),
    Schema("gen", {**_LM_COLUMNS, "answer": _FILLED}, GEN_NUMBER),
    Schema("gen", {**_LM_COLUMNS, "aliases": _TEXTS}, GEN_ALIASES),
    Schema("gen", {**_LM_COLUMNS, "subject": _TEXT}, GEN_LINE),
    Schema("lm", _LM_COLUMNS, LM),
)
MC2_SCHEMA = Schema("mc2", {"query": _TEXT, "correct": _TEXTS, "incorrect": _TEXTS}, MC2)
SOLUTION_SCHEMA = Schema("gen", {**_LM_COLUMNS, "answer": _FILLED}, GEN_SOLUTION)
_MARK = "#### "


def schema_of(path: str, number: int, row: Row) -> Schema:
    """The schema whose columns a row has; UsageError names the row."""
    _check_object(path, number, row)
    for schema in SCHEMAS:
        if schema.columns.keys() <= row.keys():
            marked = schema.config is GEN_NUMBER and _MARK in str(row["continuation"])
            return SOLUTION_SCHEMA if marked else schema
    known = "; ".join(f"{schema.name}: {', '.join(schema.columns)}" for schema in SCHEMAS)
    raise UsageError(
        f"{path}, row {number}: the columns {', '.join(row) or '(none)'} "
        "are of no known kind of task",
        hint=f"a task file has the columns of one of: {known}",
    )


def as_in_harness(schema: Schema, name: str) -> Schema:
    """The schema with the scores that the harness's task of that name has."""
    if schema.config is MC and any(fnmatchcase(name, pattern) for pattern in ACCURACY_ALONE):
        return replace(schema, config=MC_PLAIN)
    return schema


def _check_object(path: str, number: int, row: object) -> None:
    if not isinstance(row, dict):
        raise UsageError(
            f"{path}, row {number}: holds a {type(row).__name__}, not an object",
            hint="a task file has one JSON object per line",
        )


def check_row(path: str, number: int, row: Row, schema: Schema) -> None:
    """Raise UsageError that names the row and what is wrong with it."""
    _check_object(path, number, row)
    if missing := [name for name in schema.columns if name not in row]:
        raise UsageError(
            f"{path}, row {number}: found the columns {', '.join(row) or '(none)'}, "
            f"but {', '.join(missing)} is missing",
            hint=f"every row of this {schema.name} file needs {', '.join(schema.columns)}",
        )
    for name, column in schema.columns.items():
        if not column.valid(row[name], row):
            raise UsageError(
                f"{path}, row {number}: `{name}` must be {column.meaning}",
                hint=f"every row of this {schema.name} file needs {', '.join(schema.columns)}",
            )
