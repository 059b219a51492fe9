"""Every tensor of every model and ensemble, declared once.

``config.pbtxt`` is written from these specs and the backend converts by them. All models have ``max_batch_size: 0``
(stages batch on their own, over requests of different shapes), so dims hold no batch axis.

Every stage takes ``cancel`` (and ``language_model`` also ``renew``): a control request, sent to the stage itself, that
names the ids of requests to end (to keep alive). A control request with nothing else is answered at once, with no
tensors, and is also the probe that tells a living stage from a dead one. Stages that keep caches take ``flush``, a
control request that empties them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

STRING, UINT8, INT32 = "TYPE_STRING", "TYPE_UINT8", "TYPE_INT32"
BOOL, UINT32, FP32 = "TYPE_BOOL", "TYPE_UINT32", "TYPE_FP32"
EMBEDDING = "EMBEDDING"
"""Stands for the embedding dtype of a deployment: FP32 on CPU, BF16 or FP16 on GPU."""


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor. ``dims`` as in config.pbtxt: -1 is any size. ``device_ok``: may live on the GPU."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    device_ok: bool = False
    help: str = ""


@dataclass(frozen=True)
class StageSpec:
    """A Triton model that hosts one stage.

    Attributes:
        error_output: the output by which errors leave instead of as errors. Steps of an ensemble that run side by
            side need it: up to release 26.02 the server never ends (and never frees) an ensemble request of which
            one step fails while another still runs. Who asks for ``alone`` gets errors as errors.
        alone: an output that no ensemble asks for, so that a request which does (as every one that names no outputs)
            was sent to the stage itself.
        error_inputs: the inputs by which such errors arrive; one that is present ends the request with it.
        needs: inputs of which a request (that is no control request) must have exactly one.
        parameters_with: a request that has this input comes with the request's own parameters too, as JSON text under
            the name ``parameters``, though that is no tensor.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    decoupled: bool = False
    uses_gpu: bool = False
    help: str = ""
    error_output: str = ""
    alone: str = ""
    error_inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    parameters_with: str = ""


@dataclass(frozen=True)
class Step:
    """One step of an ensemble; maps are {stage tensor: ensemble tensor}."""

    stage: str
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class EnsembleSpec:
    """A Triton ensemble."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...] = field(default=())
    help: str = ""


REQUEST = TensorSpec("request", STRING, (1,), True, help="JSON, see contract/request.py")
MEDIA = TensorSpec("media", STRING, (-1,), True, help="raw encoded media (PNG, MP4, WAV ...), one element each")
GENERATE_INPUTS = (
    TensorSpec("text_input", STRING, (1,), True, help="prompt, as the model reads it"),
    TensorSpec("image", STRING, (-1,), True, help="pictures: base64, raw bytes or http(s) URLs"),
    TensorSpec("stream", BOOL, (1,), True, help="a response for each piece of the answer"),
    TensorSpec("sampling_parameters", STRING, (1,), True, help="JSON, see contract/vllm_sampling.py"),
    TensorSpec("exclude_input_in_output", BOOL, (1,), True, help="leave the prompt out of the text of a whole answer"),
    *(
        TensorSpec(f"return_{name}", BOOL, (1,), True, help=f"send the output {name}")
        for name in ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    ),
)
"""Named as those of Triton's vLLM backend, see contract/generate.py."""
TOKENS_ONLY = TensorSpec("tokens_only", BOOL, (1,), True, help="send input_ids alone, however many; beside request")
DETOKENIZE = TensorSpec(
    "detokenize", INT32, (-1,), True, help="token ids to spell out, none for the output about alone"
)
FLUSH = TensorSpec("flush", BOOL, (1,), True, help="empty the stage's caches, or say why not")
CANCEL = TensorSpec("cancel", STRING, (-1,), True, help="ids of requests to end now")
RENEW = TensorSpec("renew", STRING, (-1,), True, help="ids of requests whose lease starts anew")

INPUT_IDS = TensorSpec("input_ids", INT32, (-1,), True, help="prompt tokens, media expanded [L]")
POSITION_IDS = TensorSpec("position_ids", INT32, (-1, -1), True, help="[axes, L]; 3 axes for mrope, else 1")
PLAN = TensorSpec("plan", STRING, (1,), True, help="JSON, see contract/plan.py")
VISION_FEATURES = TensorSpec("vision_features", UINT8, (-1,), True, help="packed, see contract/features.py")
AUDIO_FEATURES = TensorSpec("audio_features", UINT8, (-1,), True, help="packed, see contract/features.py")
VISION_EMBEDDINGS = TensorSpec("vision_embeddings", EMBEDDING, (-1, -1), True, True, "[rows, hidden * (1 + deepstack)]")
VISION_RUNS = TensorSpec(
    "vision_runs", INT32, (-1,), True, help="rows of each part of pruned videos, see MediaItem.runs in contract/plan.py"
)
AUDIO_EMBEDDINGS = TensorSpec("audio_embeddings", EMBEDDING, (-1, -1), True, True, "[rows, hidden]")
VISION_ERROR = TensorSpec(
    "vision_error", STRING, (1,), True, help="why there are no embeddings (TriptychError.to_wire)"
)
AUDIO_ERROR = TensorSpec("audio_error", STRING, (1,), True, help="why there are no embeddings (TriptychError.to_wire)")

VISION_ROWS = TensorSpec("vision_rows", INT32, (-1,), True, help="rows of each picture and video; never in ensembles")
AUDIO_ROWS = TensorSpec("audio_rows", INT32, (-1,), True, help="rows of each sound; never in ensembles")

TEXT = TensorSpec("text", STRING, (1,), True, help="of the tokens in detokenize, special ones included")
TOKEN_STRINGS = TensorSpec("token_strings", STRING, (-1,), True, help="the vocabulary's spelling of each of them")
ABOUT = TensorSpec(
    "about", STRING, (1,), True, help="with detokenize: JSON of context_length, model_type, architectures, modalities"
)

DELTA = (
    TensorSpec("text", STRING, (1,), help="text since the last response"),
    TensorSpec("token_ids", INT32, (-1,), help="tokens since the last response"),
    TensorSpec("finish_reason", STRING, (1,), help="stop, length, or empty while running"),
    TensorSpec("index", INT32, (1,), help="choice number"),
    TensorSpec("info", STRING, (1,), help="JSON: usage, logprobs, matched_stop, timings; or empty"),
)

GENERATED = (
    TensorSpec("text_output", STRING, (-1,), help="text since the last response, of each answer"),
    TensorSpec("finish_reasons", STRING, (-1,), help="stop, length, or None while it runs"),
    TensorSpec("cumulative_logprob", FP32, (-1,), help="sum over the tokens so far"),
    TensorSpec("logprobs", STRING, (-1,), help="JSON, of the tokens since the last response"),
    TensorSpec("num_input_tokens", UINT32, (1,), help="tokens of the prompt, media included"),
    TensorSpec("num_output_tokens", UINT32, (-1,), help="tokens since the last response"),
)
"""In place of :data:`DELTA` where the request came as :data:`GENERATE_INPUTS`; a response has those asked for."""

PREPROCESS = StageSpec(
    "preprocess",
    (REQUEST, MEDIA, TOKENS_ONLY, *GENERATE_INPUTS, DETOKENIZE, CANCEL),
    (INPUT_IDS, POSITION_IDS, PLAN, VISION_FEATURES, AUDIO_FEATURES, TEXT, TOKEN_STRINGS, ABOUT),
    help="fetches, decodes, applies chat template and processor",
    needs=(REQUEST.name, "text_input", DETOKENIZE.name),
    parameters_with="text_input",
)
VISION_ENCODER = StageSpec(
    "vision_encoder",
    (VISION_FEATURES, FLUSH, CANCEL),
    (VISION_EMBEDDINGS, VISION_RUNS, VISION_ROWS, VISION_ERROR),
    uses_gpu=True,
    help="pictures and video frames",
    error_output=VISION_ERROR.name,
    alone=VISION_ROWS.name,
)
AUDIO_ENCODER = StageSpec(
    "audio_encoder",
    (AUDIO_FEATURES, FLUSH, CANCEL),
    (AUDIO_EMBEDDINGS, AUDIO_ROWS, AUDIO_ERROR),
    uses_gpu=True,
    help="sounds",
    error_output=AUDIO_ERROR.name,
    alone=AUDIO_ROWS.name,
)
LANGUAGE_MODEL = StageSpec(
    "language_model",
    (
        *(INPUT_IDS, POSITION_IDS, PLAN, VISION_EMBEDDINGS, VISION_RUNS, AUDIO_EMBEDDINGS),
        *(VISION_ERROR, AUDIO_ERROR, FLUSH, CANCEL, RENEW),
    ),
    (*DELTA, *GENERATED),
    decoupled=True,
    uses_gpu=True,
    help="continuous batching with a paged KV cache",
    error_inputs=(VISION_ERROR.name, AUDIO_ERROR.name),
    needs=(INPUT_IDS.name,),
)
STAGES = {spec.name: spec for spec in (PREPROCESS, VISION_ENCODER, AUDIO_ENCODER, LANGUAGE_MODEL)}

_DELTA_MAP = {spec.name: spec.name for spec in DELTA}
CHAT = EnsembleSpec(
    "chat",
    (REQUEST, MEDIA),
    DELTA,
    (
        Step(
            "preprocess",
            {"request": "request", "media": "media"},
            {n: n for n in ("input_ids", "position_ids", "plan", "vision_features", "audio_features")},
        ),
        Step(
            "vision_encoder",
            {"vision_features": "vision_features"},
            {n: n for n in ("vision_embeddings", "vision_runs", "vision_error")},
        ),
        Step(
            "audio_encoder",
            {"audio_features": "audio_features"},
            {n: n for n in ("audio_embeddings", "audio_error")},
        ),
        Step(
            "language_model",
            {
                n: n
                for n in (
                    *("input_ids", "position_ids", "plan"),
                    *("vision_embeddings", "vision_runs", "vision_error", "audio_embeddings", "audio_error"),
                )
            },
            _DELTA_MAP,
        ),
    ),
    help="text, pictures, videos and sounds in, text out",
)
CHAT_TEXT = EnsembleSpec(
    "chat_text",
    (REQUEST,),
    DELTA,
    (
        Step("preprocess", {"request": "request"}, {n: n for n in ("input_ids", "position_ids", "plan")}),
        Step("language_model", {n: n for n in ("input_ids", "position_ids", "plan")}, _DELTA_MAP),
    ),
    help="text in, text out: no encoder step",
)
GENERATE = EnsembleSpec(
    "generate",
    # none required: where another one is there, the server answers a request without it by nothing at all
    GENERATE_INPUTS,
    # the vLLM backend has its finish reasons in one array under a name in the singular
    tuple(replace(spec, name="finish_reason") if spec.name == "finish_reasons" else spec for spec in GENERATED),
    (
        Step(
            "preprocess",
            {spec.name: spec.name for spec in GENERATE_INPUTS},
            {n: n for n in ("input_ids", "position_ids", "plan", "vision_features")},
        ),
        CHAT.steps[1],
        Step(
            "language_model",
            {
                n: n
                for n in (
                    *("input_ids", "position_ids", "plan"),
                    *("vision_embeddings", "vision_runs", "vision_error"),
                )
            },
            {spec.name: "finish_reason" if spec.name == "finish_reasons" else spec.name for spec in GENERATED},
        ),
    ),
    help="a prompt and pictures in, text out, with the tensors of Triton's vLLM backend",
)
ENSEMBLES = {spec.name: spec for spec in (CHAT, CHAT_TEXT, GENERATE)}
