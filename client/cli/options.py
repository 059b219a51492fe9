"""The options of ``triptych serve``: those of the stages come from the contract, so that none is forgotten."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.settings import Settings

from .parser import CommandError

# Settings whose option is not simply their name with dashes.
_NAMES = {"model": "--model-path", "allowed_media_hosts": "--allowed-media-host"}
# What users of SGLang and vLLM call them, and some values of them.
_ALSO = {"tp": ("--tp-size", "--tensor-parallel-size"), "ep": ("--ep-size",)}
_OFF = {"cuda_graphs": "--disable-cuda-graph", "prefix_cache": "--disable-radix-cache"}
_VALUES: dict[str, dict[Any, Any]] = {
    "attention_backend": {"fa3": "flash_attn", "torch_native": "sdpa"},
    "mm_attention_backend": {"fa3": "flash_attn", "triton_attn": "triton"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8"},
    "chunked_prefill_size": {-1: 0},
}
# Settings that hold for the endpoint's own process, whatever server it asks.
_OF_THE_ENDPOINT_TOO = ("log_level", "log_format")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def option_of(setting: str) -> str:
    """The command-line option of a field of Settings."""
    return _NAMES.get(setting, "--" + setting.replace("_", "-"))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one option for every field of Settings, with the help text of its docstring."""
    group = parser.add_argument_group("model and engine")
    group.add_argument("model_argument", nargs="?", metavar="MODEL", help="what to serve; short for --model-path")
    types, helps = get_type_hints(Settings), _helps()
    for field in fields(Settings):
        option, kind = option_of(field.name), types[field.name]
        common: dict[str, Any] = {"dest": field.name, "default": None}
        text = helps[field.name].replace("%", "%%")
        if field.name == "enable_multimodal":
            # users write it without a value too
            group.add_argument(option, nargs="?", const="on", metavar="auto|on|off", help=text, **common)
        elif kind is bool:
            shown = " (on by default)" if field.default else ""
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text + shown, **common)
            if (off := _OFF.get(field.name)) is not None:
                group.add_argument(off, action="store_false", help=f"the same as --no-{option[2:]}", **common)
        elif kind in (int, float, str):
            shown = "" if field.default == "" else f" (default {field.default})"
            group.add_argument(option, type=kind, metavar=_metavar(kind), help=text + shown, **common)
            for name in _ALSO.get(field.name, ()):
                group.add_argument(name, type=kind, metavar=_metavar(kind), help=f"the same as {option}", **common)
        else:
            group.add_argument(option, action="append", metavar="HOST", help=text + " (may be repeated)", **common)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the arguments ask for.

    Raises:
        CommandError: a value that is not allowed, or a model that is not there.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    given |= {name: also.get(given[name], given[name]) for name, also in _VALUES.items() if name in given}
    if args.model_argument is not None:
        if given.get("model", args.model_argument) != args.model_argument:
            raise CommandError(f"two models: {args.model_argument!r} and --model-path {given['model']!r}", "give one")
        given["model"] = args.model_argument
    if "model" in given:
        given["model"] = resolve_model(given["model"])
    if given.get("chat_template", "").endswith(".jinja"):
        given["chat_template"] = _template_file(given["chat_template"])
    try:
        return Settings.from_dict(given)
    except TriptychError as error:
        name = (error.param or "").removeprefix("settings.")
        message = error.message.replace(f"settings.{name}", option_of(name)) if name else error.message
        raise CommandError(message) from None


def refuse_with_running_server(args: argparse.Namespace) -> None:
    """With --triton-url the settings are those of the server that runs.

    Raises:
        CommandError: an option that would have no effect.
    """
    others = [f.name for f in fields(Settings) if f.name not in _OF_THE_ENDPOINT_TOO]
    given = [option_of(name) for name in others if getattr(args, name) is not None]
    given += ["MODEL"] if args.model_argument is not None else []
    given += [f"--{name}" for name in ("tritonserver", "server-log") if getattr(args, name.replace("-", "_"))]
    given += [f"--{name}" for name in ("grpc-port", "http-port") if getattr(args, name.replace("-", "_"))]
    given += ["--open-triton-management"] if args.open_triton_management else []
    given += ["--trace-config"] if args.trace_config else []
    if given:
        raise CommandError(
            f"{', '.join(given)} has no effect on a server that runs already (--triton-url)",
            "leave it out, or start a server of your own without --triton-url",
        )


def resolve_model(model: str) -> str:
    """The model as the stages need it: folders absolute, since they run elsewhere.

    Raises:
        CommandError: neither the built-in model, nor a checkpoint folder, nor the form of a hub id.
    """
    if model == "builtin":
        return model
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CommandError(
                f"{folder} is no model: it has no config.json", "name a folder in Hugging Face layout, or 'builtin'"
            )
        return str(folder.resolve())
    if _HUB_ID.fullmatch(model):
        return model
    raise CommandError(
        f"there is no model {model!r}: no such folder, and not a hub id (organisation/name)",
        "name a folder in Hugging Face layout, a hub id, or 'builtin'",
    )


def _template_file(name: str) -> str:
    """Its absolute path, since stages run elsewhere; raises CommandError where there is no such file."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise CommandError(f"there is no chat template {name!r}", "name a .jinja file that is there")
    return str(path.resolve())


def served_name(args: argparse.Namespace) -> str:
    """The name requests use: as asked for, else the model as it was given."""
    if args.served_model_name:
        return str(args.served_model_name)
    return name_of(args.model_argument or args.model or Settings.model)


def name_of(model: str) -> str:
    """The default name in requests of a model."""
    return "triptych-builtin" if model == Settings.model else model


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", str: "NAME"}[kind]


def _helps() -> dict[str, str]:
    """Field name -> description, from the "Attributes" section of the docstring of Settings."""
    text = inspect.getdoc(Settings) or ""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.partition("Attributes:")[2].splitlines():
        if match := re.match(r"    ((?:\w+, )*\w+): (.*)", line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        else:
            for name in names:
                found[name] += " " + line.strip()
    return {f.name: found.get(f.name, "").strip().removesuffix(".") for f in fields(Settings)}
