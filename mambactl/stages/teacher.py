"""Which model a checkpoint is compared with."""

from mambactl.checkpoint.load import load_lineage
from mambactl.errors import UsageError


def teacher_of(source: str, given: str | None, option: str) -> str:
    """The model that is given, else the teacher or the origin in the lineage of `source`.

    Raises UsageError that names `option` when neither is known.
    """
    origin = load_lineage(source) or {}
    spec = given or origin.get("teacher") or origin.get("source")
    if not spec:
        raise UsageError(
            f"{source} does not say what it was made from",
            hint=f"name the model to compare with: {option} MODEL",
        )
    return spec
