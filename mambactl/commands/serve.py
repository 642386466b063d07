"""`serve`: a model behind the OpenAI API, until a signal ends it."""

from typing import Any

from mambactl import console
from mambactl.generation import decoding
from mambactl.options import ServeConfig
from mambactl.serving.running import Server
from mambactl.stage_result import StageResult


def run(config: ServeConfig, source: str) -> StageResult:
    """Serve; the URL is the one line of stdout, once requests are answered."""

    def announce(url: str) -> None:
        content = {"stage": "serve", "checkpoint": source, "metrics": {"url": url}}
        console.announce_result(url, content)
        console.log(f"serving {server.service.name}; Ctrl-C ends it")

    server = Server(config, source, announce)
    server.run()
    if server.ended_by is not None:
        console.log(f"{server.ended_by} ended the server")
    return StageResult(source, {"url": server.url}, written=True)


def plan(config: ServeConfig, source: str) -> dict[str, Any]:
    """Dry run: the models that would answer."""
    return decoding.plan_models(config, source) | {"host": config.host, "port": config.port}
