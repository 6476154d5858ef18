"""What a server tells Prometheus of itself."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters and histograms of one server, in a registry of their own; every thread may write to them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("megabts_requests_total", "Requests answered", ("route", "status"), registry=r)
        self.prompt_tokens = Counter("megabts_prompt_tokens_total", "Tokens read of prompts", registry=r)
        self.new_tokens = Counter("megabts_completion_tokens_total", "Tokens generated", registry=r)
        self.cancelled = Counter("megabts_cancelled_total", "Completions whose client went away", registry=r)
        self.waiting = Gauge("megabts_waiting", "Completions that have not begun", registry=r)
        self.running = Gauge("megabts_running", "Completions that run", registry=r)
        self.first_token = Histogram(
            "megabts_first_token_seconds", "From a request to a completion's first token", registry=r, buckets=SECONDS
        )
        self.token = Histogram(
            "megabts_token_seconds", "From one token of a completion to the next", registry=r, buckets=SECONDS
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
