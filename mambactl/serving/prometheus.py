"""Counts and times of a server, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mambactl_requests", "Replies by path and status", ["path", "status"], registry=registry
        )
        self.running = Gauge("mambactl_rows_running", "Rows being written", registry=registry)
        self.waiting = Gauge(
            "mambactl_requests_waiting", "Prompts that wait for a row", registry=registry
        )
        self.prompt_tokens = Counter(
            "mambactl_prompt_tokens", "Tokens of prompts", registry=registry
        )
        self.kept_tokens = Counter(
            "mambactl_prompt_tokens_kept",
            "Tokens of prompts that were not read again",
            registry=registry,
        )
        self.kept_bytes = Gauge(
            "mambactl_kept_bytes", "Bytes held after earlier prompts", registry=registry
        )
        self.tokens = Counter("mambactl_tokens", "Tokens written", registry=registry)
        self.steps = Counter("mambactl_steps", "Steps of the engine", registry=registry)
        self.drafted = Counter("mambactl_drafted_tokens", "Drafted tokens", registry=registry)
        self.accepted = Counter(
            "mambactl_accepted_tokens", "Drafted tokens that were accepted", registry=registry
        )
        self.first_token = Histogram(
            "mambactl_first_token_seconds",
            "Seconds from a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "mambactl_answer_seconds",
            "Seconds from a request to the end of its answer",
            buckets=SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
