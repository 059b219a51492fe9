"""The command line without a server: options, doctor, and what it says when something is missing."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from triptych.client.cli import main
from triptych.client.cli.main import build
from triptych.client.cli.options import option_of, served_name, settings_of
from triptych.client.cli.parser import CommandError
from triptych.python_models.contract.settings import Settings


def serve_args(*args: str) -> argparse.Namespace:
    return build().parse(["serve", *args])


def test_every_setting_has_an_option_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    text = " ".join(shown[shown.index("model and engine:") :].split())
    for field in fields(Settings):
        # on/off options come in two forms
        option = option_of(field.name)
        _, found, after = text.replace(f"{option}, --no-{option[2:]} ", f"{option} ").partition(f" {option} ")
        assert found, field.name
        assert len(after.split(" --")[0].split()) > 2, f"{field.name} has no help"


def test_what_users_of_other_servers_call_them() -> None:
    args = serve_args(
        *("--tp-size", "2", "--ep-size=2", "--disable-cuda-graph", "--disable-radix-cache", "--attention-backend=fa3"),
        *("--mm-attention-backend=triton_attn", "--kv-cache-dtype=fp8_e4m3", "--chunked-prefill-size", "-1"),
    )
    assert settings_of(args) == Settings(
        tp=2,
        ep=2,
        cuda_graphs=False,
        prefix_cache=False,
        attention_backend="flash_attn",
        mm_attention_backend="triton",
        kv_cache_dtype="fp8",
        chunked_prefill_size=0,
    )
    with pytest.raises(CommandError, match="--attention-backend must be one of auto, triton"):
        settings_of(serve_args("--attention-backend=flashinfer"))


def test_options_become_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    args = serve_args(
        str(tmp_path),
        "--context-length=128",
        "--mem-fraction-static",
        "0.5",
        "--trust-remote-code",
        "--allowed-media-host=a:1",
        "--allowed-media-host=b",
        "--dtype=float16",
    )
    assert settings_of(args) == Settings(
        model=str(tmp_path.resolve()),
        context_length=128,
        mem_fraction_static=0.5,
        trust_remote_code=True,
        allowed_media_hosts=("a:1", "b"),
        dtype="float16",
    )
    assert settings_of(serve_args()) == Settings()
    assert settings_of(serve_args("--model-path", "org/name")).model == "org/name"


@pytest.mark.parametrize(
    ("args", "expected"),
    [([], "auto"), (["--enable-multimodal"], "on"), (["--enable-multimodal", "off", "--tp", "1"], "off")],
)
def test_enable_multimodal_with_and_without_a_value(args: list[str], expected: str) -> None:
    assert settings_of(serve_args(*args)).enable_multimodal == expected


def test_a_chat_template_file_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    assert settings_of(serve_args("--chat-template", "mine.jinja")).chat_template == str(tmp_path / "mine.jinja")
    with pytest.raises(CommandError, match=r"no chat template 'other\.jinja'"):
        settings_of(serve_args("--chat-template", "other.jinja"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--limit-mm-data-per-request", '{"images": 1}'], "--limit-mm-data-per-request.images.*'image'"),
        (["--limit-mm-data-per-request", '{"image": -1}'], "at least 0"),
        (["--mm-process-config", "{"], "--mm-process-config is not JSON"),
        (["--mm-attention-backend", "flashinfer"], "auto, sdpa, triton, flash_attn"),
        (["--mm-feature-transport", "nvlink"], "auto, cuda_ipc, cpu"),
        (["--enable-multimodal", "yes"], "auto, on, off"),
    ],
)
def test_wrong_media_options_are_refused(args: list[str], words: str) -> None:
    with pytest.raises(CommandError, match=words):
        settings_of(serve_args(*args))


def test_the_served_name_is_the_model_as_given() -> None:
    assert served_name(serve_args()) == "triptych-builtin"
    assert served_name(serve_args("org/name")) == "org/name"
    assert served_name(serve_args("--model-path=org/name", "--served-model-name=x")) == "x"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["/no/such/folder"], "no such folder"),
        (["{tmp}"], "config.json"),
        (["a/b", "--model-path", "c/d"], "two models"),
        (["--context-length=-1"], "--context-length must be"),
        (["--mem-fraction-static=1.5"], "--mem-fraction-static must be at most 1"),
        (["--heartbeat-s=nan"], "--heartbeat-s must be"),
        (["--max-body-mb=0"], "--max-body-mb"),
        (["--max-body-mb=9999"], "--max-body-mb"),
        (["--port=70000"], "--port"),
        (["--host=no.such.host.invalid"], "--host"),
        (["--tritonserver=/no/such", "--port=0"], "/no/such"),
        (["--device=abacus", "--port=0"], "abacus"),
        (["--triton-url=127.0.0.1:1", "--device=cpu", "builtin"], "--device, MODEL has no effect"),
    ],
)
def test_what_cannot_be_served_is_one_clear_error(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *(arg.replace("{tmp}", str(tmp_path)) for arg in args)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("triptych serve: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["serve", "--contxt-length=5"], "did you mean --context-length?"),
        (["serve", "--model", "x/y"], "did you mean --model-path?"),
        (["serve", "--port", "many"], "invalid int value: 'many'"),
        (["chat", "--imgae", "x", "question"], "did you mean --image?"),
        (["chat", "a", "b"], "unexpected argument 'b'"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required"),
    ],
)
def test_wrong_arguments_have_status_2(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("triptych ")


def test_a_missing_libpython_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("triptych.client.launcher.binary._libpython_candidates", lambda: iter(()))
    assert main(["serve", "--port=0"]) == 1
    error = capsys.readouterr().err
    assert "libpython" in error
    assert "apt-get" in error
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  libpython" in out
    assert "not ready" in out


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["doctor", f"--port={port}"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "numpy", "libpython", "tritonserver", "gpu", "shared memory"):
        assert f"ok    {name}" in out
    assert "warn  port" in out
    assert "--port" in out
    assert main(["doctor", "--tritonserver", "/no/such"]) == 1
    assert "FAIL  tritonserver" in capsys.readouterr().out


def test_chat_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def error(*args: Any) -> str:
        assert main(["chat", *map(str, args)]) == 1
        return capsys.readouterr().err

    assert "triptych serve" in error("--url", "http://127.0.0.1:1", "hello")
    assert "No such file" in error("--image", tmp_path / "none.png", "hello")
    (tmp_path / "empty.png").write_bytes(b"")
    assert "empty" in error("--image", tmp_path / "empty.png", "hello")
    assert "--url" in error("--url", "ftp://x", "hello")


def test_command_errors_carry_a_remedy() -> None:
    assert str(CommandError("broken", "mend it")) == "broken\n  mend it"
