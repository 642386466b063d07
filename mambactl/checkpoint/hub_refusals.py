"""Error messages for refusals of the hub, each with the command that helps."""

from typing import Literal

AGAIN = "run the same command again"


def url_of(repo: str) -> str:
    """The page of a repository."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def log_in(may: str) -> str:
    """Hint that leads to a token with the permissions needed."""
    return f"run `hf auth login`, or set HF_TOKEN to a token that may {may}"


def accept_terms(page: str) -> str:
    """Hint that leads to access to a gated repository."""
    return f"accept its terms on {page}, and with that account {log_in('read')}"


def status_of(error: Exception) -> int | None:
    """The HTTP status of an answer that was an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def refusal(status: int | None, repo: str, may: Literal["read", "write"]) -> tuple[str, str]:
    """Sentence for an HTTP status of the hub, and a hint."""
    what = f"read {repo}" if may == "read" else f"write for {repo.partition('/')[0]}"
    known = {
        401: ("the hub does not know the token", log_in(may)),
        403: (f"the token may not {what}", log_in(what)),
        404: (f"the hub has no {repo} that the token may see", log_in(may)),
        429: ("the hub asks to wait: too many requests", f"{AGAIN} in some minutes"),
    }
    return known.get(status or 0, (f"the hub failed on {repo}", AGAIN))
