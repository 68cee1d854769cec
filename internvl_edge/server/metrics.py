"""Metrics for Prometheus. Their names follow the words of vLLM and LMDeploy, with a prefix of our own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from internvl_edge.runtime.reply import Reply

from .admission import Admission
from .chat_reply import cached_tokens
from .engine import ServedModel

_PREFIX = "internvl_edge_"
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 120)
# Names of fields come from clients. So many are counted one by one, and the rest together.
_MOST_FIELDS = 50


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, admission: Admission, served: ServedModel) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._served = served
        self._fields: set[str] = set()
        self._hits = 0
        ProcessCollector(registry=self.registry)
        self._gauge(
            "requests_running", "Requests that were admitted and are not answered yet, without waiting ones."
        ).set_function(lambda: max(0, admission.running - self._waiting()))
        self._gauge("requests_waiting", "Answers that wait for a row of the KV cache.").set_function(self._waiting)
        self._gauge("slots_busy", "Rows of the KV cache that compute an answer.").set_function(self._busy)
        self._gauge("engine_progress_timestamp_seconds", "When the engine made its last step.").set_function(
            lambda: served.progress
        )
        self.requests = self._counter("requests_total", "Chat requests by their outcome.", "outcome")
        self._prompt_tokens = self._counter("prompt_tokens_total", "Tokens of prompts.")
        self._cached = self._counter("cached_prompt_tokens_total", "Tokens of prompts that were not computed again.")
        self._generated = self._counter("generation_tokens_total", "Tokens of answers.")
        self._tiles = self._counter("image_tiles_total", "Tiles of images.")
        self._image_hits = self._counter("image_cache_hits_total", "Images whose tokens were in the cache.")
        self._ignored = self._counter("ignored_fields_total", "Fields of requests that nobody knows.", "field")
        self._truncated = self._counter("grammar_truncated_total", "Answers in a given form that ended too early.")
        self._queue = self._histogram("queue_seconds", "From the submission of an answer to its row.")
        self._preprocess = self._histogram("preprocess_seconds", "Reading the body, the images and the prompt.")
        self._vision = self._histogram("vision_seconds", "The vision tower, of requests with images.")
        self._prefill = self._histogram("prefill_seconds", "The prompt in the decoder.")
        self._first = self._histogram("time_to_first_token_seconds", "From the request to the first token.")
        self._per_token = self._histogram("time_per_output_token_seconds", "Between two tokens of an answer.")
        self.seconds = self._histogram("request_seconds", "From the request to the end of its answer.")
        self._info = Gauge(
            f"{_PREFIX}model_info", "The model.", ("bundle", "engine", "dialect", "sha"), registry=self.registry
        )

    def loaded(self, bundle: str, engine: str, dialect: str, sha: str) -> None:
        """Say which model is served."""
        self._info.clear()
        self._info.labels(bundle, engine, dialect, sha).set(1)

    def answered(self, replies: Sequence[Reply], preprocess_s: float, has_form: bool) -> None:
        """Count the replies to one request, whose prompt they share."""
        first = replies[0]
        self._prompt_tokens.inc(len(first.prompt_ids))
        self._cached.inc(cached_tokens(replies))
        self._generated.inc(sum(len(reply.output_ids) for reply in replies))
        self._tiles.inc(sum(first.tiles))
        self._preprocess.observe(preprocess_s)
        if first.tiles:
            self._vision.observe(sum(reply.timings["vision_s"] for reply in replies))
        self._prefill.observe(sum(reply.timings["prefill_s"] for reply in replies))
        spent = sum(first.timings[name] for name in ("waiting_s", "vision_s", "prefill_s"))
        self._first.observe(preprocess_s + spent)
        for reply in replies:
            self._queue.observe(reply.timings["waiting_s"])
            if len(reply.output_ids) > 1:
                self._per_token.observe(reply.timings["decode_s"] / (len(reply.output_ids) - 1))
            if has_form and reply.finish_reason == "length":
                self._truncated.inc()

    def ignored(self, fields: Sequence[str]) -> None:
        """Count fields that nobody knows."""
        for name in fields:
            if name not in self._fields and len(self._fields) >= _MOST_FIELDS:
                name = "other"
            self._fields.add(name)
            self._ignored.labels(name).inc()

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        model = self._served.peek
        hits = model.image_cache_hits if model is not None else 0
        self._image_hits.inc(hits - self._hits if hits >= self._hits else hits)  # a model that was loaded again is at 0
        self._hits = hits
        return generate_latest(self.registry)

    def _waiting(self) -> int:
        model = self._served.peek
        return 0 if model is None else model.load_now.waiting

    def _busy(self) -> int:
        model = self._served.peek
        return 0 if model is None else model.load_now.computed

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(_PREFIX + name, text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(_PREFIX + name, text, buckets=_SECONDS, registry=self.registry)
