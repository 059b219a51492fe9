"""What the launcher says when it cannot do its work."""

from __future__ import annotations


class LauncherError(Exception):
    """A start-up problem the user can mend.

    Attributes:
        message: what is wrong.
        remedy: what to do about it; "" where the message says it all.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n  {remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy
