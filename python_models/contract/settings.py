"""The options of a deployment that any stage reads: one frozen dataclass, sent to each stage as JSON.

The launcher's command-line options map to these fields one to one; each config.pbtxt carries them in its parameter
``settings``, so a model repository says everything a stage needs to know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from . import _check as check
from .answer import REASONING_PARSER_ALIASES, REASONING_PARSERS, TOOL_PARSER_ALIASES, TOOL_PARSERS
from .errors import invalid
from .logs import FORMATS, LEVELS
from .request import MODALITIES


@dataclass(frozen=True)
class Settings:
    """Options of a deployment.

    Attributes:
        model: "builtin", a folder in Hugging Face layout, or a hub id.
        revision: hub revision; "" is the default branch.
        trust_remote_code: run the code that a checkpoint brings along for its processor and tokenizer.
        device: "auto" (cuda where there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's on GPU, float32 on CPU), "float32", "bfloat16" or "float16".
        quantization: how the checkpoint's weights are quantised, which it says itself; another one than it says is
            refused. Weights are not quantised while they are loaded.
        load_format: "auto" (the checkpoint's weights) or "dummy" (random ones of the same shapes, to measure speed).
        json_model_override_args: JSON object merged over the checkpoint's config.json, in every stage.
        mm_process_config: JSON object of options for processing media, with sections image, video and audio, such as
            {"image": {"max_pixels": 1048576}, "video": {"fps": 3, "max_frames": 60}}; docs/options.md lists them.
        enable_multimodal: "auto" (what the checkpoint takes), "on" (the same, and a checkpoint that takes text alone is
            refused) or "off" (text alone: no encoder is loaded, media are refused); without a value it is "on".
        limit_mm_data_per_request: JSON object of the most media of a kind in one request, such as
            {"image": 2, "video": 1, "audio": 0}; a kind that it does not name has no limit of its own.
        mm_attention_backend: attention of the encoders: "auto" (triton on a GPU where the encoder packs sequences, else
            sdpa), "sdpa", "triton" (one call for all pictures and sounds of a batch) or "flash_attn".
        mm_feature_transport: how embeddings go from encoder to language model: "cuda_ipc" (they stay on the GPU), "cpu"
            (through host memory) or "auto" (cuda_ipc where there is a GPU).
        keep_mm_feature_on_device: the encoders' cache of embeddings is on their GPU; off, it is in host memory and what
            is found in it is copied back.
        chat_template: name of a chat template in place of the checkpoint's own (such as qwen2-vl, vicuna_v1.1; docs/
            options.md lists them), or a .jinja file; "" and "glm-4v" are the checkpoint's own.
        tool_call_parser: format of tool calls in answers: "auto" (told by the chat template), "none" (left as text) or
            a name of docs/tools.md, such as hermes, llama3_json, mistral, glm45 or qwen3_coder.
        reasoning_parser: format of reasoning in answers: "auto" (told by the chat template), "none" (left as text) or
            a name of docs/tools.md, such as qwen3, deepseek-r1, glm45 or kimi.
        context_length: longest prompt + answer in tokens; 0 takes the checkpoint's.
        max_running_requests: requests that decode together.
        max_mamba_cache_size: requests whose recurrent state (Mamba, gated delta net) is held at once, at most
            max_running_requests; 0 takes that many. No effect on decoders without such layers.
        max_queued_requests: requests that may wait for that; one more is refused as overloaded.
        chunked_prefill_size: tokens that one engine step computes at most; 0 computes every prompt in one piece.
        kv_cache_tokens: tokens the KV cache holds; 0 sizes it from memory.
        block_size: tokens of one KV block.
        mem_fraction_static: share of GPU memory for weights and KV cache together.
        kv_cache_dtype: "auto" (as the weights) or "fp8" (e4m3: half the memory; costs accuracy, see docs).
        prefix_cache: keep the KV blocks of finished requests for prompts that begin alike.
        attention_backend: "auto" (triton on a GPU, sdpa on a CPU), "triton", "flash_attn" or "sdpa".
        decoder_backend: "auto" (fused where the family allows it), "fused" or "transformers".
        cuda_graphs: replay decode steps as CUDA graphs (no effect on a CPU).
        overlap: queue the next step before the tokens of this one are read; "auto" does so on a GPU, "on", "off".
        speculative_tokens: tokens guessed per step by prompt lookup for requests that do not say themselves; 0 is off.
        tp: GPUs that share each layer of the language model (tensor parallel).
        ep: of those, groups that hold different experts (expert parallel); divides tp.
        max_media_mb: media embeddings that requests in flight may hold, in MiB; one more request is refused.
        request_timeout_s: a request ends after this long in any case.
        heartbeat_s: a running request that has nothing to say sends an empty delta this often.
        mm_max_concurrent_calls: requests whose media one preprocess instance handles at once.
        mm_per_request_timeout: seconds for fetching and processing the media of one request.
        mm_cache_size_mb: budget of each encoder's cache of embeddings; 0 turns it off.
        video_pruning_rate: share of a video's tokens to leave out, those that change least from frame to frame (EVS),
            from 0 to less than 1; "" takes the checkpoint's own.
        max_image_pixels: pixels of a picture or video frame before resizing.
        max_video_frames: frames sampled from one video at most.
        max_audio_s: seconds of one sound at most.
        max_media_bytes: encoded bytes of one medium at most.
        max_media_items: media in one request at most.
        max_batch_rows: embedding rows one encoder batch computes at most. More at a time makes no faster work of large
            pictures, and all wait for the last of them.
        gpu_preprocessing: "auto" (on where the encoders have a GPU), "on" or "off": resize pictures on the encoder's
            device where the family can. Pixels differ from the processor's by a step of 255 here and there.
        allowed_media_hosts: "host" or "host:port" that http(s) media may come from although it is loopback or
            private.
        preprocess_instances: processes of the preprocess stage.
        vision_encoder_url, audio_encoder_url: "host:port" of gRPC endpoints of other servers (comma-separated) that run
            this encoder instead; "" runs it here.
        torch_threads: CPU threads of each stage; 0 leaves torch's default.
        enable_metrics: measurements for Prometheus, at /metrics of the endpoint and of the Triton server.
        log_level: of endpoint and stages: "debug", "info", "warning" or "error".
        log_format: of endpoint and stages: "text", or "json" for one object a line.
    """

    model: str = "builtin"
    revision: str = ""
    trust_remote_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = ""
    load_format: str = "auto"
    json_model_override_args: str = ""
    chat_template: str = ""
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    enable_multimodal: str = "auto"
    limit_mm_data_per_request: str = ""
    mm_attention_backend: str = "auto"
    mm_feature_transport: str = "auto"
    keep_mm_feature_on_device: bool = True
    mm_process_config: str = ""
    context_length: int = 0
    max_running_requests: int = 64
    max_mamba_cache_size: int = 0
    max_queued_requests: int = 1024
    chunked_prefill_size: int = 2048
    kv_cache_tokens: int = 0
    block_size: int = 16
    mem_fraction_static: float = 0.85
    kv_cache_dtype: str = "auto"
    prefix_cache: bool = True
    attention_backend: str = "auto"
    decoder_backend: str = "auto"
    cuda_graphs: bool = True
    overlap: str = "auto"
    speculative_tokens: int = 0
    tp: int = 1
    ep: int = 1
    max_media_mb: int = 4096
    request_timeout_s: float = 600.0
    heartbeat_s: float = 2.0
    mm_max_concurrent_calls: int = 32
    mm_per_request_timeout: float = 60.0
    mm_cache_size_mb: int = 256
    video_pruning_rate: str = ""
    max_image_pixels: int = 100_000_000
    max_video_frames: int = 768
    max_audio_s: float = 1800.0
    max_media_bytes: int = 256 * 2**20
    max_media_items: int = 64
    max_batch_rows: int = 4096
    gpu_preprocessing: str = "auto"
    allowed_media_hosts: tuple[str, ...] = ()
    preprocess_instances: int = 1
    vision_encoder_url: str = ""
    audio_encoder_url: str = ""
    torch_threads: int = 0
    enable_metrics: bool = True
    log_level: str = "info"
    log_format: str = "text"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Parse the ``settings`` parameter.

        Raises:
            TriptychError: INVALID_REQUEST that names an unknown key (and the nearest known one) or a wrong type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise invalid(f"settings are not JSON: {error}", "settings") from None
        return cls.from_dict(dict(check.mapping(data, "settings")))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """As :meth:`from_json`, from parsed values."""
        check.known_keys(data, (f.name for f in fields(cls)), "settings")
        types = get_type_hints(cls)
        given: dict[str, Any] = {}
        for name, value in data.items():
            where = f"settings.{name}"
            if types[name] is int:
                given[name] = check.integer(value, where, _MINIMUM.get(name, 0))
            elif types[name] is float:
                given[name] = check.number(value, where, _MINIMUM.get(name, 0))
            elif types[name] is bool:
                given[name] = check.boolean(value, where)
            elif types[name] is str:
                given[name] = check.string(value, where)
            else:
                if not isinstance(value, (list, tuple)):
                    raise invalid(f"{where} must be a list of strings", where)
                given[name] = tuple(check.string(item, where) for item in value)
        if given.get("mem_fraction_static", 0.5) > 1:
            raise invalid("settings.mem_fraction_static must be at most 1", "settings.mem_fraction_static")
        if given.get("video_pruning_rate") and not _is_share(given["video_pruning_rate"]):
            raise invalid(
                "settings.video_pruning_rate must be a number from 0 to less than 1, not "
                f"{given['video_pruning_rate']!r}",
                "settings.video_pruning_rate",
            )
        if given.get("mm_process_config"):
            sections = _object(given["mm_process_config"], "settings.mm_process_config", MODALITIES)
            for name, options in sections.items():
                check.mapping(options, f"settings.mm_process_config.{name}")
        if given.get("limit_mm_data_per_request"):
            limits = _object(given["limit_mm_data_per_request"], "settings.limit_mm_data_per_request", MODALITIES)
            for name, limit in limits.items():
                check.integer(limit, f"settings.limit_mm_data_per_request.{name}", 0)
        for name in ("vision_encoder_url", "audio_encoder_url"):
            for address in given.get(name, "").split(",") if given.get(name) else ():
                if not _ADDRESS.fullmatch(address.strip()):
                    raise invalid(
                        f'settings.{name} must be "host:port" or several of them, got {address!r}', f"settings.{name}"
                    )
        for name, allowed in _CHOICES.items():
            if name in given and given[name] not in allowed:
                raise invalid(
                    f"settings.{name} must be one of {', '.join(allowed)}, not {given[name]!r}", f"settings.{name}"
                )
        return cls(**given)

    @property
    def media_limits(self) -> Mapping[str, int]:
        """Modality -> most media of it in one request, where there is a limit."""
        found: Mapping[str, int] = json.loads(self.limit_mm_data_per_request or "{}")
        return found

    def pool_of(self, stage: str) -> str:
        """Addresses of the servers that run an encoder instead of this one, "" where it runs here."""
        return str(getattr(self, f"{stage}_url", ""))

    def to_json(self) -> str:
        """Every field, so that a model repository is complete in itself."""
        return json.dumps(asdict(self))


def _object(text: str, where: str, keys: Iterable[str]) -> Mapping[str, Any]:
    """A setting that is the text of a JSON object with such keys."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise invalid(f"{where} is not JSON: {error}", where) from None
    found = check.mapping(data, where)
    check.known_keys(found, keys, where)
    return found


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}")
_CHOICES = {
    "load_format": ("auto", "dummy"),
    "tool_call_parser": ("auto", "none", *sorted((*TOOL_PARSERS, *TOOL_PARSER_ALIASES))),
    "reasoning_parser": ("auto", "none", *sorted((*REASONING_PARSERS, *REASONING_PARSER_ALIASES))),
    "kv_cache_dtype": ("auto", "fp8"),
    "attention_backend": ("auto", "triton", "flash_attn", "sdpa"),
    "decoder_backend": ("auto", "fused", "transformers"),
    "overlap": ("auto", "on", "off"),
    "gpu_preprocessing": ("auto", "on", "off"),
    "enable_multimodal": ("auto", "on", "off"),
    "mm_attention_backend": ("auto", "sdpa", "triton", "flash_attn"),
    "mm_feature_transport": ("auto", "cuda_ipc", "cpu"),
    "log_level": LEVELS,
    "log_format": FORMATS,
}
_MINIMUM = {
    "tp": 1,
    "ep": 1,
    "max_media_mb": 1,
    "max_running_requests": 1,
    "block_size": 1,
    "mem_fraction_static": 0.01,
    "request_timeout_s": 0.1,
    "heartbeat_s": 0.05,
    "mm_max_concurrent_calls": 1,
    "mm_per_request_timeout": 0.01,
    "max_image_pixels": 1,
    "max_video_frames": 1,
    "max_audio_s": 0.01,
    "max_media_bytes": 1,
    "max_media_items": 1,
    "max_batch_rows": 1,
    "preprocess_instances": 1,
}
