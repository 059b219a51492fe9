"""Lines for operators about what the engine computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .request import Work
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


class BatchLog:
    """One line about prefill and one about decode every few seconds, where there was any."""

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self._since = now
        self._prompts = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._decoded = 0
        self._decoding = 0

    def add(self, works: Sequence[Work]) -> None:
        """Count a step; decodes come first in it."""
        decodes = len(works)
        while decodes and _is_prefill(works[decodes - 1]):
            decodes -= 1
        for work in works[decodes:]:
            self._prompt_tokens += work.count
            if work.num_logits:
                self._prompts += 1
                self._cached_tokens += work.request.num_cached
        self._decoded += decodes
        self._decoding = decodes or self._decoding

    def write(self, now: float, scheduler: Scheduler) -> None:
        """Log what came together, if it is time."""
        elapsed = now - self._since
        if elapsed < self._every_s:
            return
        running, queued, usage = len(scheduler.running), len(scheduler.waiting), scheduler.usage
        if self._prompt_tokens:
            logger.info(
                "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
                "#running-req: %d, #queue-req: %d",
                self._prompts,
                self._prompt_tokens,
                self._cached_tokens,
                usage,
                running,
                queued,
            )
        if self._decoded:
            logger.info(
                "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, gen throughput (token/s): %.2f, "
                "#queue-req: %d",
                self._decoding,
                sum(request.num_computed for request in scheduler.running),
                usage,
                self._decoded / elapsed,
                queued,
            )
        self._since = now
        self._prompts = self._prompt_tokens = self._cached_tokens = self._decoded = self._decoding = 0


def _is_prefill(work: Work) -> bool:
    """Whether it computes prompt tokens (of one that is cached there may be a single one), or anew what was lost."""
    return work.start < work.request.num_prompt or work.count > 1 + len(work.drafts)
