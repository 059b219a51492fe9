"""Runs of tokens that an answer may not repeat: what keeps a reader of documents out of endless rows of dots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class RepeatGuard:
    """Knows which next tokens would make a run of ``size`` tokens stand twice (Paulus et al. 2017, arXiv:1705.04304).

    Prompt and answer count, as for transformers' ``no_repeat_ngram_size``. With ``window`` a run is forgotten when it
    does not lie in the last ``window`` tokens any more, as for DeepSeek-OCR and ``no_repeat_ngram_window_size``.
    """

    def __init__(
        self, size: int, window: int, allowed: Iterable[int], prompt_ids: NDArray[np.int64], vocab_size: int
    ) -> None:
        """Args: ``window`` 0: everything; ``allowed``: tokens that may follow all the same."""
        self._window = window
        self._allowed = frozenset(allowed)
        self._vocab_size = vocab_size
        self._length = 0
        self._last: deque[int] = deque(maxlen=size - 1)
        # the tokens before the last of a run -> that token -> where the run began last
        self._runs: dict[tuple[int, ...], dict[int, int]] = {}
        for token in prompt_ids[-window:].tolist():
            self.accept(token)

    def accept(self, token_id: int) -> None:
        """Another token of the answer."""
        before = tuple(self._last)
        if len(before) == self._last.maxlen:
            self._runs.setdefault(before, {})[token_id] = self._length - len(before)
        self._last.append(token_id)
        self._length += 1

    def banned(self) -> NDArray[np.int64]:
        """Tokens that may not come next."""
        first = self._length - self._window if self._window else 0
        found = self._runs.get(tuple(self._last), {})
        return np.array(
            [
                token
                for token, start in found.items()
                # placeholders of media may lie outside the vocabulary
                if start >= first and token < self._vocab_size and token not in self._allowed
            ],
            dtype=np.int64,
        )
