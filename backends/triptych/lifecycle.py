"""From a model's config to a running stage, and from there to the end."""

from __future__ import annotations

import atexit
import gc
import json
import locale
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

from triptych.python_models.contract import logs
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.generate import PARAMETERS
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import CANCEL, FLUSH, RENEW, STAGES, StageSpec
from triptych.python_models.stage import Stage, Telemetry
from triptych.python_models.stages import stage_class

from .io import read_inputs
from .metrics import MetricsThread
from .remote import RemoteEncoderStage
from .responder import Sender

CLOSE_S = 5.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """What ``initialize`` is told, parsed.

    Attributes:
        spec: the tensors of the hosted stage.
        stage: name of the stage, or "/path/file.py:Class".
        settings: options of the deployment.
        device: torch device string.
        dtypes: {output: config.pbtxt dtype}.
        labels: what the samples of its metrics carry.
    """

    spec: StageSpec
    stage: str
    settings: Settings
    device: str
    dtypes: dict[str, str]
    labels: dict[str, str]

    @classmethod
    def parse(cls, args: Mapping[str, str]) -> ModelConfig:
        """Read the arguments of ``initialize``.

        Raises:
            TriptychError: INVALID_REQUEST that names the parameter at fault.
        """
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        model = args["model_name"]
        for key in ("stage", "settings"):
            if key not in parameters:
                raise invalid(f'config.pbtxt of model {model!r} lacks the parameter "{key}"', key)
        stage = parameters["stage"]
        name = model if ":" in stage else stage
        if name not in STAGES:
            raise invalid(f"model {model!r} hosts stage {name!r}; there are: {', '.join(STAGES)}", "stage")
        spec = STAGES[name]
        settings = Settings.from_json(parameters["settings"])
        labels = {"stage": name}
        groups = config.get("instance_group", ())
        if sum(int(group.get("count", 1)) * max(len(group.get("gpus", ())), 1) for group in groups) > 1:
            # gauges of several processes under one name would overwrite each other
            labels["instance"] = args["model_instance_name"]
        return cls(
            spec,
            stage,
            settings,
            _device(spec, settings, args["model_instance_kind"], args["model_instance_device_id"]),
            {output["name"]: output["data_type"] for output in config["output"]},
            labels,
        )


class HostedStage:
    """A stage inside a Triton model instance."""

    def __init__(self, args: Mapping[str, str]) -> None:
        """Build the stage; ``args`` as ``TritonPythonModel.initialize`` gets them.

        Raises:
            TritonModelException: it cannot be built.
        """
        try:
            config = ModelConfig.parse(args)
            # the first to be registered is the last to run: everything has been said and stopped by then, and taking
            # torch apart module by module would hold up the server's end by seconds
            atexit.register(os._exit, 0)
            _prepare_process(config.labels, config.settings)
            if config.settings.torch_threads:
                torch.set_num_threads(config.settings.torch_threads)
            self._spec = config.spec
            server = os.getppid()
            self._telemetry = MetricsThread(config.labels, lambda: _end_with(server), config.settings.enable_metrics)
            self._stage = _stage(config, self._telemetry)
            # what was loaded stays: collections that walk through all of it would hold up every stream
            gc.collect()
            gc.freeze()
        except TriptychError as error:
            raise pb_utils.TritonModelException(error.to_wire()) from None
        except Exception as error:  # noqa: BLE001 - a load must fail with one clear message
            _LOG.exception("model %s could not be loaded", args["model_name"])
            raise pb_utils.TritonModelException(
                f"{type(error).__name__}: {error}; the traceback is in the server's log"
            ) from None
        self._sender = Sender(config.spec, config.dtypes, self._stage.pauses)
        self._stage.on_fatal = self._die

    def accept(self, request: Any) -> None:
        """Take one request. Never blocks and never raises: the server would take the whole batch as failed."""
        try:
            responder = self._sender.responder(request.get_response_sender(), request.request_id())
        except Exception:  # noqa: BLE001 - nothing may leave execute
            _LOG.exception("a request without a way to answer it was dropped")
            return
        try:
            if request.is_cancelled():
                raise TriptychError(ErrorKind.CANCELLED, "the request was cancelled before this stage began")
            if self._spec.error_output:
                responder.outputs = frozenset(request.requested_output_names())
            inputs = read_inputs(request, self._spec)
            if FLUSH.name in inputs:
                self._stage.flush(responder)
                return
            controls = self._control(inputs)
            for name in self._spec.error_inputs:
                if error := inputs.pop(name, None):
                    raise TriptychError.from_wire(error[0].decode("utf-8", "replace"))
            needs = self._spec.needs
            given = [name for name in needs if name in inputs]
            if needs and not given and not (controls and not inputs):
                raise invalid(f"the request lacks the input {' or '.join(needs)}", needs[0])
            if len(given) > 1:
                raise invalid(f"only one of the inputs {' and '.join(given)} is allowed", given[1])
            if self._spec.parameters_with in inputs:
                inputs[PARAMETERS] = [request.parameters()]
            self._stage.submit(request.request_id(), inputs, responder)
        except TriptychError as error:
            responder.fail(error)
        except Exception as error:  # noqa: BLE001 - nothing may leave execute
            _LOG.exception("a request could not be taken", extra=logs.about(request.request_id()))
            responder.fail(TriptychError(ErrorKind.STAGE_FAILED, f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """End every request, the stage and the threads; gives up on what does not end in a few seconds."""
        closing = threading.Thread(target=self._close_stage, name="triptych-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            _LOG.error("the stage did not stop within %g s", CLOSE_S)
        self._sender.close(CLOSE_S)
        self._telemetry.close(CLOSE_S)

    def _die(self) -> None:
        """End this process once every error is sent; whoever watches the stages has the server load it again."""
        _LOG.critical("the stage can do nothing more in this process, which ends")
        self._sender.close(CLOSE_S)
        os._exit(1)

    def _close_stage(self) -> None:
        try:
            self._stage.close()
        except Exception:  # noqa: BLE001 - the server must be able to end
            _LOG.exception("the stage failed while it was stopped")

    def _control(self, inputs: dict[str, Any]) -> bool:
        """Carry out and remove ``cancel`` and ``renew``; whether there was one."""
        cancel = inputs.pop(CANCEL.name, None)
        renew = inputs.pop(RENEW.name, None)
        if cancel:
            self._stage.cancel(_ids(cancel))
        if renew:
            self._stage.renew(_ids(renew))
        return cancel is not None or renew is not None


def _ids(values: Sequence[bytes]) -> list[str]:
    """Request ids; the empty one, which every request without an id has, names nobody."""
    return [value.decode("utf-8", "replace") for value in values if value]


def _stage(config: ModelConfig, telemetry: Telemetry) -> Stage:
    """The stage itself, or what stands for an encoder that runs elsewhere."""
    if config.stage == config.spec.name and (pool := config.settings.pool_of(config.stage)):
        return RemoteEncoderStage(config.stage, pool, config.settings, telemetry, config.device)
    return stage_class(config.stage)(config.settings, telemetry, config.device)


def _device(spec: StageSpec, settings: Settings, kind: str, device_id: str) -> str:
    """The torch device of an instance.

    Raises:
        TriptychError: the instance group and ``settings.device`` contradict each other, or torch has no such GPU.
    """
    if "GPU" not in kind:
        if spec.uses_gpu and not settings.pool_of(spec.name) and settings.device.startswith("cuda"):
            raise invalid(
                f"settings.device is {settings.device!r} but the model's instance_group is KIND_CPU; "
                "write the model repository with --gpu, or set the device to cpu",
                "settings.device",
            )
        return "cpu"
    if settings.device == "cpu":
        raise invalid(
            "settings.device is 'cpu' but the model's instance_group is KIND_GPU; write the model repository anew",
            "settings.device",
        )
    index = int(device_id)
    if index >= torch.cuda.device_count():
        build = torch.version.cuda or "no CUDA: install a CUDA build of torch, or serve with --device cpu"
        raise invalid(
            f"GPU {index} is not there for torch {torch.__version__} (built with {build}; "
            f"it sees {torch.cuda.device_count()} GPUs)",
            "settings.device",
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def _prepare_process(labels: Mapping[str, str], settings: Settings) -> None:
    """Make the stub's embedded interpreter like an ordinary one: text files in UTF-8, logs to the server's log."""
    try:
        locale.setlocale(locale.LC_CTYPE, "")
    except locale.Error:
        locale.setlocale(locale.LC_CTYPE, "C")
    if locale.nl_langinfo(locale.CODESET).upper() != "UTF-8":
        # it starts in the C locale, where open() without an encoding cannot read more than ASCII
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    logs.configure(labels.get("instance", labels["stage"]), settings.log_level, settings.log_format)


def _end_with(server: int) -> None:
    """End this process once the server that started it is gone: its own watch misses a server not yet reaped."""
    if os.getppid() != server:
        os._exit(1)
