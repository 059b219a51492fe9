"""POST /v1/chat/completions, from the body to the last byte."""

from __future__ import annotations

import time
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from . import sse
from .answers import Answers
from .fields import parse
from .run import Run, read
from .service import Service


async def chat_completions(request: Request, service: Service) -> Response:
    """Answer one chat completion.

    Raises:
        TriptychError: for every failure before the first byte of the answer.
    """
    arrival = time.perf_counter()
    options = service.options
    work = partial(parse, served_model_name=options.served_model_name, lease_s=options.lease_s)
    call, ticket = await read(request, service, work)
    run = Run(request, service, ticket, [(call.request, call.media)], call.names, arrival)
    writer = sse.Completion(
        run.id,
        int(time.time()),
        options.served_model_name,
        service.fingerprint,
        call.stream_options.include_usage,
        call.request.sampling.n,
        call.stream_options.include_obfuscation,
        call.service_tier,
        options.enable_cache_report,
        arrival if call.return_timings else None,
        Answers(call.request.template.tools, call.stream_reasoning),
    )
    stream = call.request.stream
    # Large media must not stay in memory while the answer is generated.
    del call
    return await run.answer(writer, stream)
