"""The architecture: configuration, tokenizer, processor and the batched forward pass used in training.

Training runs the modules of transformers' Qwen2.5-Omni thinker on rectangular batches, instead of its loop over single
pictures and sounds; `python -m triptych.python_models.builtin.training.check` checks that both give the same numbers.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"
# (torch and transformers leave many methods untyped)

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ...families import torchvision_fix
from . import questions

torchvision_fix.install()

from transformers import (  # noqa: E402
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.audio_utils import mel_filter_bank  # noqa: E402

Network = Any  # a transformers module; its attributes are not typed
Layout = tuple[Tensor, Tensor, Tensor, bool]
PATCH, MERGE, WINDOW = 14, 2, 112
MIN_PIXELS, MAX_PIXELS = 112 * 112, 672 * 672
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 112 * 112, 168 * 168
VIDEO_FPS, MIN_FRAMES, MAX_FRAMES = 2, 8, 12
POSITIONS_PER_SECOND = 4
MEL_BINS, HOP = 128, 160
SOUND_WINDOW = 400  # half a chunk of mel frames: sounds of up to 8 s are one chunk
VOCABULARY = 1024
NAMED = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", *NAMED.values()]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] in ('video', 'video_url') %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] in ('audio', 'audio_url', 'input_audio') %}{{ '<|audio_start|><|audio_pad|><|audio_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def smart_resize(width: int, height: int, low: int, high: int) -> tuple[int, int]:
    """The (width, height) that the processor resizes a picture to."""
    unit = PATCH * MERGE
    w, h = round(width / unit) * unit, round(height / unit) * unit
    if w * h > high:
        beta = math.sqrt(width * height / high)
        w, h = (max(unit, math.floor(v / beta / unit) * unit) for v in (width, height))
    elif w * h < low:
        beta = math.sqrt(low / (width * height))
        w, h = (math.ceil(v * beta / unit) * unit for v in (width, height))
    return w, h


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the wordings; capitals and digits are tokens of their own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    bpe.train_from_iterator(([*questions.wordings_corpus(), "user\n", "assistant\n", "system\n"]) * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_specific_special_tokens=NAMED,
        model_max_length=4096,
        extra_special_tokens=[s for s in SPECIAL if s not in ("<|im_end|>", "<|pad|>")],
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniProcessor:
    """The processor; sizes and frame rates live in its configuration files."""
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
        ),
        video_processor=Qwen2VLVideoProcessor(
            patch_size=PATCH,
            merge_size=MERGE,
            size={"shortest_edge": VIDEO_MIN_PIXELS, "longest_edge": VIDEO_MAX_PIXELS},
            fps=VIDEO_FPS,
            min_frames=MIN_FRAMES,
            max_frames=MAX_FRAMES,
            cap_pixels_per_frame=False,
        ),
        feature_extractor=WhisperFeatureExtractor(feature_size=MEL_BINS, hop_length=HOP, chunk_length=30),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniThinkerConfig:
    """About 17 million parameters: vision 8 x 256, sound 4 x 256, text 6 x 256."""
    token: Any = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|pad|>"),
    }
    vision = {
        "depth": 8,
        "hidden_size": 256,
        "intermediate_size": 768,
        "out_hidden_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": WINDOW,
        "fullatt_block_indexes": [1, 3, 5, 7],
    }
    audio = {
        "num_mel_bins": MEL_BINS,
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 768,
        "d_model": 256,
        "max_source_positions": 1500,
        "n_window": SOUND_WINDOW,
        "output_dim": 256,
    }
    make: Any = Qwen2_5OmniThinkerConfig
    return make(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        position_id_per_seconds=POSITIONS_PER_SECOND,
        audio_token_index=token("<|audio_pad|>"),
        image_token_index=token("<|image_pad|>"),
        video_token_index=token("<|video_pad|>"),
        audio_start_token_id=token("<|audio_start|>"),
        audio_end_token_id=token("<|audio_end|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        pad_token_id=token("<|pad|>"),
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The model with random weights."""
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(make_config(tokenizer))
    config: Any = model.generation_config
    token: Any = tokenizer.convert_tokens_to_ids
    config.eos_token_id, config.pad_token_id = token(["<|im_end|>", "<|pad|>"])
    config.do_sample, config.max_new_tokens = False, 64
    return model


def save(model: Network, tokenizer: PreTrainedTokenizerFast, folder: Path, shard: str = "100MB") -> None:
    """Write the Hugging Face folder in bf16; the model's own weights stay as they are."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    for part in (model.config.text_config, model.config.vision_config, model.config.audio_config):
        part.dtype = torch.bfloat16
    model.save_pretrained(folder, max_shard_size=shard)
    make_processor(tokenizer).save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved checkpoint."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return tokenizer


# ---- the batched forward pass ----


@dataclass(frozen=True)
class Grid:
    """Patches of one picture or clip: (time, height, width) as the processor counts them."""

    time: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens that the language model sees."""
        return self.time * self.height * self.width // MERGE**2


@functools.lru_cache(maxsize=512)
def vision_layout(grid: Grid, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rotary cosines and sines [patches, 64] in the processor's order, and how patches fill the attention windows.

    The last three: for every place in a window the patch that fills it [windows, 64], which places hold a patch
    [windows, 64], and for every patch its place in the flattened windows [patches].
    """
    h, w, span = grid.height // MERGE, grid.width // MERGE, WINDOW // PATCH // MERGE
    rows = torch.arange(grid.height).view(h, MERGE, 1, 1).expand(h, MERGE, w, MERGE).transpose(1, 2).reshape(-1)
    columns = torch.arange(grid.width).view(1, 1, w, MERGE).expand(h, MERGE, w, MERGE).transpose(1, 2).reshape(-1)
    frequencies = 1.0 / 10000 ** (torch.arange(0, 32, 2).float() / 32)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], -1).repeat(grid.time, 2)
    high, wide = math.ceil(h / span), math.ceil(w / span)
    index = torch.full((grid.time, high * span, wide * span), -1)
    index[:, :h, :w] = torch.arange(grid.time * h * w).view(grid.time, h, w)
    index = index.view(grid.time, high, span, wide, span).transpose(2, 3).reshape(-1, span * span, 1)
    index = torch.where(index < 0, -1, index * MERGE**2 + torch.arange(MERGE**2)).flatten(1)
    filled = index >= 0
    back = torch.empty(int(filled.sum()), dtype=torch.long)
    back[index[filled]] = filled.flatten().nonzero().squeeze(1)
    return tuple(t.to(device) for t in (angles.cos(), angles.sin(), index.clamp(min=0), filled, back))  # type: ignore[return-value]


def frames_layout(grid: Grid, x: Tensor) -> Tensor:
    """Attention over one time step at a time: [batch * time, heads, height * width, 64]."""
    return x.unflatten(2, (grid.time, -1)).transpose(1, 2).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, heads, patches, 64]."""
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def vision_project(block: Network, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, patches, 64] of x [batch, patches, 256]."""
    attention, y = block.attn, block.norm1(x)
    shape = (*x.shape[:2], attention.num_heads, -1)
    q, k, v = (f(y).view(shape).transpose(1, 2) for f in (attention.q, attention.k, attention.v))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def vision_finish(block: Network, x: Tensor, y: Tensor) -> Tensor:
    """What follows the attention: x [batch, patches, 256], y [batch, heads, patches, 64]."""
    x = x + block.attn.proj(y.transpose(1, 2).reshape(x.shape))
    return x + block.mlp(block.norm2(x))


def vision_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid, layout: Layout | None) -> Tensor:
    """Attention of [batch, heads, patches, 64] within windows, or within a frame without a layout."""
    batch = len(q)
    if layout is None:
        if grid.time == 1:
            return F.scaled_dot_product_attention(q, k, v)
        y = F.scaled_dot_product_attention(frames_layout(grid, q), frames_layout(grid, k), frames_layout(grid, v))
        return y.unflatten(0, (batch, grid.time)).transpose(1, 2).flatten(2, 3)
    index, filled, back, whole = layout
    windows, places = index.shape
    q, k, v = (
        t[:, :, index.flatten()].unflatten(2, (windows, places)).transpose(1, 2).flatten(0, 1) for t in (q, k, v)
    )
    mask = None if whole else filled[None, :, None, None].expand(batch, -1, 1, places, -1).flatten(0, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.unflatten(0, (batch, windows)).transpose(1, 2).flatten(2, 3)[:, :, back]


def see(tower: Network, patches: Tensor, grid: Grid) -> Tensor:
    """Vision tower: patches [batch, n, 1176] to tokens [batch, n / 4, 256] in the processor's order."""
    weight = tower.patch_embed.proj.weight
    x = F.linear(patches, weight.flatten(1))
    cos, sin, index, filled, back = vision_layout(grid, str(patches.device))
    layout = (index, filled, back, bool(grid.height % 8 == 0 and grid.width % 8 == 0))
    for i, block in enumerate(tower.blocks):
        q, k, v = vision_project(block, x, cos, sin)
        y = vision_attention(q, k, v, grid, None if i in tower.fullatt_block_indexes else layout)
        x = vision_finish(block, x, y)
    return tower.merger.mlp(tower.merger.ln_q(x).unflatten(1, (-1, MERGE**2)).flatten(2))


def hear(tower: Network, mel: Tensor) -> Tensor:
    """Sound tower: log-mel [batch, 128, frames], frames of one length up to 8 s, to tokens [batch, n, 256]."""
    x = F.gelu(tower.conv2(F.gelu(tower.conv1(mel)))).transpose(1, 2)
    x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
    for layer in tower.layers:
        a, y = layer.self_attn, layer.self_attn_layer_norm(x)
        q, k, v = (f(y).unflatten(2, (a.num_heads, -1)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        x = x + a.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    x = tower.avg_pooler(x.transpose(1, 2)).transpose(1, 2)
    return tower.proj(tower.ln_post(x))


def patchify(frames: Tensor) -> tuple[Tensor, Grid]:
    """Frames [batch, time, height, width, 3] in 0..255 to the processor's patches [batch, n, 1176].

    A picture is one frame.
    """
    if frames.shape[1] == 1:
        frames = frames.expand(-1, 2, -1, -1, -1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=frames.device)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=frames.device)
    x = (frames / 255 - mean) / std
    batch, time, height, width, _ = x.shape
    grid = Grid(time // 2, height // PATCH, width // PATCH)
    x = x.view(batch, grid.time, 2, grid.height // MERGE, MERGE, PATCH, grid.width // MERGE, MERGE, PATCH, 3)
    return x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(batch, grid.tokens * MERGE**2, -1), grid


@functools.cache
def _mel_tables(device: str) -> tuple[Tensor, Tensor]:
    filters = mel_filter_bank(201, MEL_BINS, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    return torch.tensor(filters, dtype=torch.float32, device=device), torch.hann_window(400, device=device)


def log_mel(samples: Tensor) -> Tensor:
    """Samples [batch, n] at 16 kHz to log-mel [batch, 128, n / 160], as WhisperFeatureExtractor gives it."""
    filters, window = _mel_tables(str(samples.device))
    spectrum = torch.stft(F.pad(samples, (0, 800)), 400, HOP, window=window, return_complex=True)
    power = spectrum[..., : samples.shape[1] // HOP].abs() ** 2
    mel = (filters.T @ power).clamp(min=1e-10).log10()
    return (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4


def sound_tokens(frames: int) -> int:
    """Tokens of a sound of that many mel frames."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def parts(network: Network) -> tuple[Network, Network, Network]:
    """The vision tower, the sound tower and the language model, in older and newer layouts of transformers."""
    whole = network.model if hasattr(network.model, "visual") else network
    return whole.visual, whole.audio_tower, getattr(whole, "language_model", network.model)


def text_angles(positions: Tensor, width: int = 64, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines [batch, 1, n, 64] of positions [3, batch, n] in time, height and width."""
    axis = torch.tensor([0] * 8 + [1] * 12 + [2] * 12, device=positions.device)
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions.float().permute(1, 2, 0)[..., axis] * frequencies
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def text_project(layer: Network, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, n, 64] of x [batch, n, 256]."""
    attention, y = layer.self_attn, layer.input_layernorm(x)
    shape = (*x.shape[:2], attention.num_heads, -1)
    q, k, v = (f(y).view(shape).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def text_finish(layer: Network, x: Tensor, y: Tensor) -> Tensor:
    """What follows the attention: x [batch, n, 256], y [batch, heads, n, 64]."""
    x = x + layer.self_attn.o_proj(y.transpose(1, 2).reshape(x.shape))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def read(network: Network, ids: Tensor, positions: Tensor, media: Tensor | None, where: Tensor | None) -> Tensor:
    """Language model: states [batch, n, 256] of ids [batch, n] at positions [3, batch, n].

    `media` rows [m, 256] go to their flat places `where` [m]. Rows are padded on the right, so causal attention alone
    keeps the padding out.
    """
    language = parts(network)[2]
    x = language.embed_tokens(ids)
    if media is not None:
        x = x.flatten(0, 1).index_copy(0, where, media.to(x.dtype)).view_as(x)
    cos, sin = text_angles(positions)
    for layer in language.layers:
        q, k, v = text_project(layer, x, cos, sin)
        x = text_finish(layer, x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return language.norm(x)
