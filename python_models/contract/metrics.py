"""Every metric that a stage reports through the server's own /metrics, declared once.

Names follow Prometheus' rules: base units (seconds, bytes), ``_total`` for counters, ``_ratio`` for shares of 1. What
the HTTP endpoint adds is in ``client/openai_api/metrics.py``; docs/metrics.md is written from both.
"""

from __future__ import annotations

from dataclasses import dataclass

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds for times of steps, tokens and first tokens."""
LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Bounds for times of whole requests."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class MetricSpec:
    """A metric family. Every sample also carries the label ``stage``; ``labels`` names further ones.

    ``stages`` are those that report it.
    """

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    stages: tuple[str, ...] = ()


_ENCODERS = ("vision_encoder", "audio_encoder")
_PREPROCESS = ("preprocess",)
_ENGINE = ("language_model",)
_ALL = (*_PREPROCESS, *_ENCODERS, *_ENGINE)


def _counter(name: str, text: str, labels: tuple[str, ...] = (), stages: tuple[str, ...] = _ENGINE) -> MetricSpec:
    return MetricSpec(name, "counter", text, labels, stages=stages)


def _gauge(name: str, text: str, stages: tuple[str, ...] = _ENGINE) -> MetricSpec:
    return MetricSpec(name, "gauge", text, stages=stages)


def _histogram(
    name: str,
    text: str,
    labels: tuple[str, ...] = (),
    buckets: tuple[float, ...] = SECONDS,
    stages: tuple[str, ...] = _ENGINE,
) -> MetricSpec:
    return MetricSpec(name, "histogram", text, labels, buckets, stages)


_SPECS = (
    # requests in a stage
    _counter(
        "triptych_requests_total", "Requests a stage ended, by outcome: ok, or the kind of error", ("outcome",), _ALL
    ),
    _gauge("triptych_requests_running", "Requests a stage is working on", _ALL),
    _gauge("triptych_requests_waiting", "Requests that wait inside a stage", _ALL),
    _histogram("triptych_stage_seconds", "Time a request spent in a stage", buckets=LONG_SECONDS, stages=_ALL),
    _histogram(
        "triptych_queue_seconds",
        "Time a request waited inside a stage: for a place (preprocess, only with media), for its batch (encoders), "
        "for a place among the running ones (language_model)",
        stages=_ALL,
    ),
    _histogram(
        "triptych_batch_size",
        "Requests in one batch of an encoder, or in one step of the language model",
        buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        stages=(*_ENCODERS, *_ENGINE),
    ),
    _histogram(
        "triptych_batch_tokens",
        "Tokens (encoders: embedding rows) in one batch or step",
        buckets=TOKENS[:15],
        stages=(*_ENCODERS, *_ENGINE),
    ),
    _gauge("triptych_heartbeat_timestamp_seconds", "Unix time of a stage's last sign of life", _ALL),
    _gauge(
        "triptych_gpu_memory_bytes", "GPU memory that a stage's process holds for its tensors", (*_ENCODERS, *_ENGINE)
    ),
    # media
    _counter("triptych_media_items_total", "Media fetched and decoded", ("modality",), _PREPROCESS),
    _counter("triptych_media_bytes_total", "Bytes of their files", ("modality",), _PREPROCESS),
    _histogram("triptych_media_fetch_seconds", "Fetching one medium from its URL", ("modality",), stages=_PREPROCESS),
    _histogram("triptych_media_decode_seconds", "Decoding and hashing one medium", ("modality",), stages=_PREPROCESS),
    _histogram("triptych_process_seconds", "Chat template, tokenizer and processor of one request", stages=_PREPROCESS),
    # encoders
    _histogram("triptych_encode_seconds", "Encoding one batch, until its embeddings are sent", stages=_ENCODERS),
    _counter("triptych_encoder_cache_hits_total", "Media served from the encoder cache", stages=_ENCODERS),
    _counter("triptych_encoder_cache_misses_total", "Media that had to be encoded", stages=_ENCODERS),
    _counter("triptych_encoder_cache_evictions_total", "Media dropped from the cache for others", stages=_ENCODERS),
    _gauge("triptych_encoder_cache_bytes", "Bytes in the encoder cache", _ENCODERS),
    _gauge("triptych_encoder_cache_limit_bytes", "Bytes that it may hold (--mm-cache-size-mb)", _ENCODERS),
    # whole requests, through whichever door they came
    _histogram("triptych_request_seconds", "Arrival at the first stage to the last token", buckets=LONG_SECONDS),
    _histogram("triptych_time_to_first_token_seconds", "Arrival at the first stage to the first token"),
    _histogram("triptych_prefill_seconds", "From a place among the running requests to the first token"),
    _histogram("triptych_inter_token_seconds", "Time between tokens of one answer"),
    _counter("triptych_answers_total", "Answers that ended, by finish reason", ("finish_reason",)),
    _histogram("triptych_request_prompt_tokens", "Prompt tokens of one request, media included", buckets=TOKENS),
    _histogram("triptych_request_generation_tokens", "Tokens of one answer", buckets=TOKENS),
    # tokens
    _counter(
        "triptych_prompt_tokens_total",
        "Prompt tokens, computed or found in cache: text, image, video or audio",
        ("kind",),
    ),
    _counter("triptych_cached_tokens_total", "Of them, found in the prefix cache"),
    _counter("triptych_generation_tokens_total", "Tokens generated"),
    _counter("triptych_draft_tokens_total", "Tokens guessed by prompt lookup"),
    _counter("triptych_accepted_draft_tokens_total", "Guessed tokens that the model confirmed"),
    _counter("triptych_embedding_bytes_total", "Bytes of embeddings received, by where they arrived", ("device",)),
    # engine
    _histogram("triptych_engine_step_seconds", "From planning a step to having its tokens"),
    _histogram("triptych_grammar_compile_seconds", "Compiling the grammar of a request"),
    _counter("triptych_preemptions_total", "Requests whose KV blocks were taken back"),
    _gauge("triptych_kv_cache_usage_ratio", "Share of KV blocks that running requests hold"),
    _gauge("triptych_kv_cache_tokens", "Tokens that the KV cache has room for"),
    _gauge("triptych_prefix_cache_usage_ratio", "Share of KV blocks that keep finished requests for prompts to come"),
)
METRICS = {spec.name: spec for spec in _SPECS}
