"""What the server loads for every model with ``backend: "triptych"``; copied alone into the backend directory.

The stub imports it by the bare name ``model``, so everything else comes from the installed package.
"""

from __future__ import annotations

from typing import Any

from triptych.backends.triptych.lifecycle import HostedStage


class TritonPythonModel:
    """The class the Python backend looks for: hands everything to :class:`HostedStage`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Build the stage that the model's config names.

        Raises:
            TritonModelException: it cannot be built; the message says why and what to do.
        """
        self._hosted = HostedStage(args)

    def execute(self, requests: list[Any]) -> None:
        """Take requests; answers go through their response senders, whenever they are ready."""
        for request in requests:
            self._hosted.accept(request)

    def finalize(self) -> None:
        """End everything that runs."""
        self._hosted.close()
