"""The wire contract: every tensor, dataclass, option, metric and error that crosses a process boundary.

Torch-free on purpose: the OpenAI shim and the CLI import it too. Everything else (``config.pbtxt``, the Triton
backend's conversions, the client) is derived from these declarations.
"""
