"""OpenTelemetry traces: one for each HTTP request, from its arrival through the stages to the last token.

Nothing is recorded while a request runs. When it is over, the times that came with its answer become spans with their
true beginnings and ends, as if each stage had sent its own. Exporting is the business of a thread with a bounded queue:
a collector that is slow or gone costs spans, never a request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.timings import PreprocessTimes, Timings

from .observation import Observation, Part

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger("triptych.shim")

_EXPORT_TIMEOUT_S = 5.0
_CLOSE_MS = 3000
_NS = 1_000_000_000
# as GenAI's semantic conventions name them; what they have no name for begins with "triptych."
_SAMPLING = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
}


class Tracing:
    """Makes and sends the traces of one endpoint.

    Args:
        provider: where spans go.
        model: name of the model in answers.
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._model = model
        self._tracer: Tracer = provider.get_tracer("triptych")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, model: str) -> Tracing | None:
        """Send traces to a collector; None where ``endpoint`` is "".

        The variables that OpenTelemetry's SDK knows (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
        OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_...) hold.

        Raises:
            TriptychError: UNSUPPORTED where the SDK is not installed.
        """
        if not endpoint:
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"traces to {endpoint} need OpenTelemetry's SDK, which is not installed ({error.name}): "
                "pip install 'triptych[otel]', or leave --otlp-traces-endpoint and the variables OTEL_... out",
            ) from None
        resource = Resource.create()
        # the SDK's way to say that the environment names none
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "triptych"}))
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)))
        return cls(provider, model)

    def begin(self, seen: Observation) -> None:
        """Open the span of a request; from now on ``seen.headers`` names it."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        parent = self._propagator.extract(seen.headers)
        span = self._tracer.start_span(seen.method, parent, SpanKind.SERVER, start_time=_ns(seen.began))
        seen.span = span
        seen.headers = {}
        self._propagator.inject(seen.headers, set_span_in_context(span))

    def end(self, seen: Observation, status: int, error: TriptychError | None, route: str, now: float) -> None:
        """Close the span of a request, with all that happened in it."""
        from opentelemetry.trace import Status, StatusCode

        span: Span = seen.span
        if span.is_recording():
            span.update_name(f"{seen.method} {route}")
            span.set_attributes(
                {
                    "http.request.method": seen.method,
                    "url.path": seen.path,
                    "http.route": route,
                    "http.response.status_code": status,
                    "triptych.request_id": seen.request_id,
                }
            )
            if error is not None:
                span.set_attribute("error.type", error.kind.value)
                # by convention a refused request is no failure of the server
                if error.kind.status >= 500:
                    span.set_status(Status(StatusCode.ERROR, error.message))
            for part in seen.parts:
                self._generation(span, part, now)
        span.end(_ns(now))

    def close(self) -> None:
        """Send what waits, within seconds."""
        self._provider.force_flush(_CLOSE_MS)
        self._provider.shutdown()

    def _generation(self, parent: Span, part: Part, now: float) -> None:
        """The span of one request to the Triton server, and those of its stages."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        sampling, usage, timings = part.request.sampling, part.usage, part.timings
        end = now if timings is None else timings.end
        operation = "chat" if part.request.prompt is None else "text_completion"
        span = self._start(parent, f"{operation} {self._model}", part.began, SpanKind.INTERNAL)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "triptych",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": part.id,
            "gen_ai.response.finish_reasons": part.finish_reasons,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "triptych.usage.image_tokens": usage.image_tokens,
            "triptych.usage.video_tokens": usage.video_tokens,
            "triptych.usage.audio_tokens": usage.audio_tokens,
        }
        for name, attribute in _SAMPLING.items():
            if (value := getattr(sampling, name)) is not None:
                attributes[attribute] = value
        if sampling.n > 1:
            attributes["gen_ai.request.choice.count"] = sampling.n
        if sampling.stop:
            attributes["gen_ai.request.stop_sequences"] = list(sampling.stop)
        span.set_attributes(attributes)
        if part.error is not None:
            span.set_attribute("error.type", part.error.kind.value)
            span.set_attribute("triptych.stage", part.error.stage or "")
            if part.error.kind is not ErrorKind.CANCELLED:
                span.set_status(Status(StatusCode.ERROR, part.error.message))
        if timings is not None:
            self._stages(span, timings)
        span.end(_ns(end))

    def _stages(self, parent: Span, timings: Timings) -> None:
        if timings.preprocess is not None:
            self._preprocess(parent, timings.preprocess)
            if timings.preprocess.media:
                self._span(parent, "encode", timings.preprocess.end, timings.arrival)
        engine = self._start(parent, "language_model", timings.arrival)
        self._span(engine, "queue", timings.arrival, timings.admitted)
        self._span(engine, "prefill", timings.admitted, timings.first_token)
        self._span(engine, "decode", timings.first_token, timings.end)
        engine.end(_ns(timings.end))

    def _preprocess(self, parent: Span, times: PreprocessTimes) -> None:
        span = self._start(parent, "preprocess", times.arrival)
        for item in times.media:
            about = {"triptych.modality": item.modality, "triptych.bytes": item.num_bytes}
            if item.fetched > item.start:
                self._span(span, "fetch", item.start, item.fetched, about)
            self._span(span, "decode_media", item.fetched, item.decoded, about)
        self._span(span, "process", times.process, times.end)
        span.end(_ns(times.end))

    def _span(
        self, parent: Span, name: str, start: float, end: float, attributes: dict[str, Any] | None = None
    ) -> None:
        span = self._start(parent, name, start)
        if attributes:
            span.set_attributes(attributes)
        span.end(_ns(max(start, end)))

    def _start(self, parent: Span, name: str, start: float, kind: Any = None) -> Span:
        from opentelemetry.trace import SpanKind, set_span_in_context

        context = set_span_in_context(parent)
        return self._tracer.start_span(name, context, kind or SpanKind.INTERNAL, start_time=_ns(start))


def _ns(seconds: float) -> int:
    return int(seconds * _NS)
