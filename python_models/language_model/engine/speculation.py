"""Guesses the next tokens of a request by looking for its last ones further up in its own text."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST, _SHORTEST = 4, 2
_PAUSE, _LONGEST_PAUSE = 16, 256


class PromptLookup:
    """Prompt lookup decoding (Saxena 2023, "Prompt Lookup Decoding") over prompt and answer.

    An index of all n-grams of 2 to 4 tokens, kept up token by token, gives the latest place where the last tokens
    stood before; what followed there is the guess. A guess that runs into the end of the text goes on from its own
    beginning, so that repetitions are guessed in full length.

    Guesses get shorter where they fail and longer where they hold. After several total failures in a row it pauses
    for some tokens, each time for twice as many.
    """

    def __init__(self, prompt: Iterable[int], most: int, vocab_size: int) -> None:
        """Args: ``most`` tokens per guess; tokens outside of ``vocab_size`` (placeholders of media) are not guessed."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._vocab_size = vocab_size
        self._most = most
        self._length = most
        self._pause = 0
        self._next_pause = _PAUSE
        for token in prompt:
            self._append(token)

    @property
    def active(self) -> bool:
        """False during a pause."""
        return self._pause == 0

    def append(self, token: int) -> None:
        """Take a token that was generated."""
        if self._pause:
            self._pause -= 1
        self._append(token)

    def propose(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next; empty where nothing is known or during a pause."""
        tokens = self._tokens
        count = min(most, self._length)
        if self._pause or count < 1:
            return []
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            start = self._after.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if start is None:
                continue
            period = len(tokens) - start
            draft = tokens[start : start + count]
            while len(draft) < count:
                draft.append(draft[len(draft) - period])
            for index, token in enumerate(draft):
                if not 0 <= token < self._vocab_size:
                    return draft[:index]
            return draft
        return []

    def report(self, proposed: int, accepted: int) -> None:
        """Learn how many tokens of a guess were right."""
        if accepted == proposed:
            self._length = min(self._most, max(2 * self._length, 1))
            self._next_pause = _PAUSE
        elif accepted:
            self._length = min(self._most, max(accepted + 1, self._length // 2))
            self._next_pause = _PAUSE
        elif self._length > 1:
            self._length //= 2
        else:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)

    def _append(self, token: int) -> None:
        tokens = self._tokens
        position = len(tokens)
        # a place becomes known when it has a next token: the last tokens must not find themselves
        for size in range(_SHORTEST, min(_LONGEST, position) + 1):
            self._after[tuple(tokens[-size:])] = position
        tokens.append(token)
