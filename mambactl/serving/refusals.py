"""Requests that are not answered: the status, and the error in the JSON that clients expect."""


class Refused(Exception):
    """A request that gets an error; `param` names the field that is wrong."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def content(self) -> dict[str, object]:
        """The body of the reply."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def queue_full(waiting: int) -> Refused:
    """Refusal of a request while too many others wait already (429)."""
    message = f"{waiting} requests wait already: try again later"
    return Refused(message, 429, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def not_ready() -> Refused:
    """Refusal of a request while the model is being loaded or the server is ending (503)."""
    message = "the model is not ready: /health says when it is"
    return Refused(message, 503, code="not_ready", headers={"Retry-After": "1"})


def ending() -> Refused:
    """Refusal of what is under way when the server ends."""
    return Refused("the server is ending", 503)


def too_long(tokens: int, new: int, most: int, field: str) -> Refused:
    """Refusal of a prompt that with its answer is longer than rows may be."""
    asked = f"{tokens} tokens of the prompt and {new} of the answer"
    return Refused(
        f"this model takes at most {most} tokens; you asked for {asked}: shorten the prompt, or "
        "lower max_tokens",
        param=field,
        code="context_length_exceeded",
    )
