"""How much the shim takes on at once. Triton queues without limit, so the limit is here."""

from __future__ import annotations

from triptych.python_models.contract.errors import ErrorKind, TriptychError


class Admission:
    """Counts requests and the bytes of their bodies.

    Args:
        max_requests: requests at once.
        max_bytes: bytes of all bodies at once.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0

    def enter(self) -> Ticket:
        """Take a request on.

        Raises:
            TriptychError: OVERLOADED.
        """
        if error := self.why_full():
            raise error
        self.requests += 1
        return Ticket(self)

    def why_full(self) -> TriptychError | None:
        """The error for one request more, or None while there is room."""
        if self.requests < self.max_requests:
            return None
        return TriptychError(
            ErrorKind.OVERLOADED,
            f"the server already handles {self.requests} requests, its limit; try again in a moment",
        )


class Ticket:
    """One request's share; :meth:`release` gives it back (once, however often it is called)."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._bytes = 0
        self._open = True

    def grow(self, num_bytes: int) -> None:
        """Account for more bytes of the body.

        Raises:
            TriptychError: OVERLOADED.
        """
        if self._admission.bytes + num_bytes > self._admission.max_bytes:
            raise TriptychError(
                ErrorKind.OVERLOADED,
                f"the server already holds {self._admission.bytes / 2**20:.0f} MiB of requests, and its limit is "
                f"{self._admission.max_bytes / 2**20:.0f} MiB; try again in a moment",
            )
        self._admission.bytes += num_bytes
        self._bytes += num_bytes

    def release_bytes(self) -> None:
        """The body is no longer held."""
        self._admission.bytes -= self._bytes
        self._bytes = 0

    def release(self) -> None:
        """The request is over."""
        self.release_bytes()
        if self._open:
            self._open = False
            self._admission.requests -= 1
