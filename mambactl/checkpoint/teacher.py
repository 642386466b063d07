"""Which model a checkpoint is compared with."""

from mambactl.checkpoint.load import load_lineage
from mambactl.checkpoint.resolve import resolve
from mambactl.errors import ModelError, UsageError


def teacher_of(source: str, given: str | None, option: str) -> str:
    """The model that is given, else the teacher or the origin in the lineage of `source`.

    Raises UsageError that names `option` when neither is known, ModelError when it is not there.
    """
    origin = load_lineage(source) or {}
    spec = given or origin.get("teacher") or origin.get("source")
    if not spec:
        raise UsageError(
            f"{source} does not say what it was made from",
            hint=f"name the model to compare with: {option} MODEL",
        )
    try:
        resolve(spec)
    except ModelError as error:
        hint = error.hint if given else f"{source} was made from it; if it moved: {option} MODEL"
        raise ModelError(f"the teacher cannot be found: {error}", hint) from error
    return spec
