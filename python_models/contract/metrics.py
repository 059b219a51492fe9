"""Every metric that a stage reports through the server's own /metrics, declared once."""

from __future__ import annotations

from dataclasses import dataclass

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass(frozen=True)
class MetricSpec:
    """A metric family. Every sample also carries the label ``stage``; ``labels`` names further ones."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = {
    spec.name: spec
    for spec in (
        MetricSpec("triptych_requests_total", "counter", "Requests a stage ended, by outcome", ("outcome",)),
        MetricSpec("triptych_requests_running", "gauge", "Requests a stage is working on"),
        MetricSpec("triptych_requests_waiting", "gauge", "Requests that wait inside a stage"),
        MetricSpec("triptych_stage_seconds", "histogram", "Time a request spent in a stage", (), SECONDS),
        MetricSpec("triptych_batch_size", "histogram", "Requests in one batch", (), (1, 2, 4, 8, 16, 32, 64, 128)),
        MetricSpec("triptych_media_items_total", "counter", "Media handled", ("modality",)),
        MetricSpec("triptych_media_bytes_total", "counter", "Encoded bytes of media handled", ("modality",)),
        MetricSpec(
            "triptych_media_fetch_seconds", "histogram", "Fetching one medium from its URL", ("modality",), SECONDS
        ),
        MetricSpec(
            "triptych_media_decode_seconds", "histogram", "Decoding and hashing one medium", ("modality",), SECONDS
        ),
        MetricSpec("triptych_encoder_cache_hits_total", "counter", "Media served from the encoder cache"),
        MetricSpec("triptych_encoder_cache_misses_total", "counter", "Media that had to be encoded"),
        MetricSpec("triptych_encoder_cache_bytes", "gauge", "Bytes in the encoder cache"),
        MetricSpec(
            "triptych_embedding_bytes_total", "counter", "Embeddings received, by where they arrived", ("device",)
        ),
        MetricSpec("triptych_prompt_tokens_total", "counter", "Prompt tokens computed or found in cache"),
        MetricSpec("triptych_cached_tokens_total", "counter", "Prompt tokens found in the prefix cache"),
        MetricSpec("triptych_generation_tokens_total", "counter", "Tokens generated"),
        MetricSpec(
            "triptych_time_to_first_token_seconds", "histogram", "Arrival at the engine to first token", (), SECONDS
        ),
        MetricSpec("triptych_inter_token_seconds", "histogram", "Time between tokens of one request", (), SECONDS),
        MetricSpec("triptych_draft_tokens_total", "counter", "Tokens guessed by prompt lookup"),
        MetricSpec("triptych_accepted_draft_tokens_total", "counter", "Guessed tokens that the model confirmed"),
        MetricSpec(
            "triptych_engine_step_seconds", "histogram", "From planning a step to having its tokens", (), SECONDS
        ),
        MetricSpec("triptych_grammar_compile_seconds", "histogram", "Compiling the grammar of a request", (), SECONDS),
        MetricSpec("triptych_preemptions_total", "counter", "Requests whose KV blocks were taken back"),
        MetricSpec("triptych_kv_cache_usage_ratio", "gauge", "Share of KV blocks in use"),
        MetricSpec("triptych_gpu_memory_bytes", "gauge", "GPU memory that a stage's process holds for its tensors"),
        MetricSpec("triptych_heartbeat_timestamp_seconds", "gauge", "Unix time of a stage's last sign of life"),
    )
}
