"""Writes docs/models.md: the models of the project's goals, one row each, and what became of all others.

    python docs/models_table.py            write docs/models.md
    python docs/models_table.py --check    fail where it is not current

What a model is stands in ``ROWS``; which tests prove it comes from docs/parity.json, which
``make parity ARGS="--report docs/parity.json"`` writes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPORT = HERE / "parity.json"
TABLE = HERE / "models.md"
GENERIC = "test_generic"
MROPE = "3 axes (mrope)"
PLAIN = "1 axis"


@dataclass(frozen=True)
class Row:
    """A model of the goals.

    Attributes:
        ids: on the Hugging Face hub.
        family: file of ``python_models/families``; "" for none.
        media: what it takes beside text.
        split: what each encoder stage loads.
        positions: of the language model.
        special: behaviour that others do not have.
        tiny: checkpoints of ``tests/tiny`` that stand for it in the parity tests.
        missing: what is not there yet.
    """

    ids: str
    family: str
    media: str
    split: str
    positions: str
    special: str
    tiny: tuple[str, ...] = ()
    missing: str = ""


ROWS = (
    Row(
        "meta-llama/Llama-3.2-11B-Vision-Instruct, -90B-Vision-Instruct",
        "mllama",
        "image",
        "vision: tower of tiles, projector",
        PLAIN,
        "pictures are no tokens: the language model's cross-attention layers read them",
        ("mllama",),
    ),
    Row("Qwen/Qwen2-VL-7B-Instruct", "qwen2_5_vl", "image, video", "vision: tower", MROPE, "", ("qwen2_vl",)),
    Row(
        "Qwen/Qwen2.5-VL-3B-Instruct, -7B, -72B",
        "qwen2_5_vl",
        "image, video",
        "vision: tower",
        f"{MROPE}, in seconds",
        "attention of the tower in windows",
        ("qwen2_5_vl",),
    ),
    Row(
        "Qwen/Qwen3-VL-8B-Instruct and the other dense ones, BF16 and FP8",
        "qwen3_vl",
        "image, video",
        "vision: tower",
        MROPE,
        "deepstack; times of a video's frames as text",
        ("qwen3_vl", "qwen3_vl_fp8"),
    ),
    Row(
        "Qwen/Qwen3-VL-30B-A3B-Instruct, -235B-A22B-Instruct, BF16 and FP8",
        "qwen3_vl",
        "image, video",
        "vision: tower",
        MROPE,
        "deepstack; mixtures of experts",
        ("qwen3_vl_moe", "qwen3_vl_moe_fp8"),
    ),
    Row(
        "deepseek-ai/deepseek-vl2, -small, -tiny",
        "deepseek_vl2",
        "image",
        "vision: SigLIP, downsampling projector, separators",
        PLAIN,
        "tiles of up to 384 pixels; latent attention (MLA) but in -tiny; published format",
        ("deepseek_vl2", "deepseek_vl2_small", "deepseek_vl2_tiny"),
    ),
    Row(
        "deepseek-ai/DeepSeek-OCR",
        "deepseek_ocr",
        "image",
        "vision: SAM, CLIP, projector, separators",
        PLAIN,
        "crops beside the whole page; published format",
        ("deepseek_ocr",),
    ),
    Row(
        "deepseek-ai/DeepSeek-OCR-2",
        "deepseek_ocr",
        "image",
        "vision: SAM, causal encoder with queries, projector",
        PLAIN,
        "published and transformers' format",
        ("deepseek_ocr2", "deepseek_ocr2_published"),
    ),
    Row(
        "deepseek-ai/Janus-Pro-7B",
        "janus",
        "image",
        "vision: SigLIP, aligner",
        PLAIN,
        "understanding; published and transformers' format",
        ("janus", "janus_published"),
        "making pictures",
    ),
    Row(
        "liuhaotian/llava-v1.5-13b, llava-hf/llava-1.5-*",
        "llava, llava_original",
        "image",
        "vision: CLIP, projector",
        PLAIN,
        "template vicuna_v1.1; the tower comes from the repository that config.json names",
        ("llava", "llava_v1_5"),
    ),
    Row(
        "liuhaotian/llava-v1.6-*, llava-hf/llava-v1.6-*",
        "llava_next, llava_original",
        "image",
        "vision: CLIP, projector, newline",
        PLAIN,
        "tiles (anyres)",
        ("llava_next", "llava_v1_6_mistral"),
    ),
    Row(
        "lmms-lab/llava-next-72b (Qwen)",
        "llava_original",
        "image",
        "vision: CLIP, projector, newline",
        PLAIN,
        "tiles (anyres); template chatml-llava; published format",
        ("llava_next_qwen",),
    ),
    Row(
        "lmms-lab/llama3-llava-next-8b",
        "llava_original",
        "image",
        "vision: CLIP, projector, newline",
        PLAIN,
        "tiles (anyres); template llava_llama_3; published format",
        ("llava_v1_6_mistral", "llava_next_qwen"),
    ),
    Row(
        "lmms-lab/llava-onevision-qwen2-7b-ov",
        "llava_onevision, llava_original",
        "image, video",
        "vision: SigLIP, projector, newline",
        PLAIN,
        "up to 9 tiles; frames are pooled; published and transformers' format",
        ("llava_onevision", "llava_onevision_published"),
    ),
    Row(
        "lmms-lab/LLaVA-NeXT-Video-7B",
        "llava_next, llava_original",
        "image, video",
        "vision: CLIP, projector, pooler",
        PLAIN,
        "frames are pooled; published and transformers' format",
        ("llava_next_video", "llava_next_video_published"),
    ),
    Row(
        "google/gemma-3-4b-it, -12b-it, -27b-it",
        "gemma3",
        "image",
        "vision: SigLIP, pooling projector",
        PLAIN,
        "a picture's tokens attend both ways; sliding windows",
        ("gemma3", "gemma3_text"),
    ),
    Row(
        "google/gemma-3n-E2B-it, -E4B-it",
        "gemma3n",
        "image, audio",
        "vision: MobileNet (timm), projector; audio: conformer, projector",
        PLAIN,
        "embeddings for every layer; layers share keys and values; without timm sounds and text alone",
        ("gemma3n",),
    ),
    Row(
        "moonshotai/Kimi-VL-A3B-Instruct",
        "kimi",
        "image",
        "vision: MoonViT, projector",
        PLAIN,
        "latent attention (MLA); published format with a tiktoken vocabulary",
        ("kimi_vl",),
    ),
    Row(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral3",
        "image",
        "vision: Pixtral, projector",
        PLAIN,
        "breaks between rows of a picture are text",
        ("mistral3",),
    ),
    Row(
        "microsoft/Phi-4-multimodal-instruct",
        "phi4_multimodal",
        "image, audio",
        "vision, audio: each its half of the embedding module",
        f"{PLAIN}, LongRoPE by request",
        "vision and speech adapters (LoRA) by request; published and transformers' format",
        ("phi4_multimodal", "phi4mm"),
    ),
    Row(
        "XiaomiMiMo/MiMo-VL-7B-RL",
        "qwen2_5_vl",
        "image, video",
        "vision: tower",
        MROPE,
        "the architecture of Qwen2.5-VL",
        ("mimo_vl",),
    ),
    Row(
        "openbmb/MiniCPM-V-2_6",
        "minicpm",
        "image, video",
        "vision: SigLIP, resampler",
        PLAIN,
        "slices; 64 queries for each; published format",
        ("minicpmv",),
    ),
    Row(
        "openbmb/MiniCPM-o-2_6",
        "minicpm",
        "image, video, audio",
        "vision: SigLIP, resampler; audio: Whisper, pooling projector",
        PLAIN,
        "slices; sounds by seconds; published format",
        ("minicpmo",),
        "speech out",
    ),
    Row(
        "zai-org/GLM-4.1V-9B-Thinking",
        "glm4v",
        "image, video",
        "vision: tower",
        MROPE,
        "a video's frames are pictures between marks",
        ("glm4v", "glm46v"),
    ),
    Row("zai-org/GLM-4.5V", "glm4v", "image, video", "vision: tower", MROPE, "mixtures of experts", ("glm4v_moe",)),
    Row("zai-org/GLM-OCR", "glm4v", "image, video", "vision: tower", MROPE, "", ("glm_ocr",)),
    Row(
        "rednote-hilab/dots.vlm1.inst",
        "dots",
        "image",
        "vision: NaViT, adapter",
        PLAIN,
        "language model of DeepSeek-V3 (MLA); published format",
        ("dots_vlm",),
    ),
    Row("rednote-hilab/dots.ocr", "dots", "image", "vision: NaViT, adapter", PLAIN, "published format", ("dots_ocr",)),
    Row(
        "Efficient-Large-Model/NVILA-8B, -15B, NVILA-Lite-*",
        "nvila, nvila_original",
        "image, video",
        "vision: SigLIP, downsampling projector",
        PLAIN,
        "dynamic S2 (three scales), tiles in the Lite ones, eight frames; both published formats",
        ("nvila", "nvila_lite", "nvila_original", "nvila_lite_original"),
    ),
    Row(
        "baidu/ERNIE-4.5-VL-28B-A3B-PT, -424B-A47B-PT",
        "ernie4_5_vl, ernie_published",
        "image, video",
        "vision: tower, resampler",
        MROPE,
        "experts by the kind of token; published and transformers' format",
        ("ernie4_5_vl_moe", "ernie4_5_vl_published"),
    ),
    Row(
        "stepfun-ai/Step3-VL-10B",
        "step3",
        "image",
        "vision: tower with two downsamplers, projector",
        PLAIN,
        "crops beside the whole picture; published format",
        ("step3_vl",),
    ),
    Row(
        "OpenGVLab/InternVL2-8B, InternVL3-8B",
        "internvl, internvl_original",
        "image, video",
        "vision: InternViT, projector",
        PLAIN,
        "up to 12 tiles; published and transformers' format, with InternLM2, Llama, Phi-3 and Qwen2",
        ("internvl", "internvl2_internlm2", "internvl2_llama", "internvl2_phi3", "internvl3_published"),
    ),
    Row(
        "Qwen/Qwen3-Omni-30B-A3B-Instruct",
        "qwen3_omni",
        "image, video, audio",
        "vision: tower; audio: tower",
        f"{MROPE}, in seconds",
        "the thinker; deepstack; mixtures of experts",
        ("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        "speech out",
    ),
    Row("Qwen/Qwen2-Audio-7B-Instruct", "qwen2_audio", "audio", "audio: tower, projector", PLAIN, "", ("qwen2_audio",)),
    Row(
        "nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16",
        "nemotron, nemotron_published",
        "image, video",
        "vision: RADIO, projector",
        PLAIN,
        "Mamba-2 layers; video pruning (EVS, arXiv:2510.14624); published format",
        ("nemotron_nano_vl", "nemotron_h_omni"),
    ),
    Row(
        "lightonai/LightOnOCR-1B-1025",
        "mistral3",
        "image",
        "vision: Pixtral, projector",
        PLAIN,
        "",
        ("lighton_ocr",),
    ),
    Row(
        "PaddlePaddle/PaddleOCR-VL",
        "paddleocr_vl",
        "image",
        "vision: tower, projector",
        MROPE,
        "",
        ("paddleocr_vl",),
    ),
    Row(
        "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
        "nemotron_nas",
        "none",
        "",
        PLAIN,
        "layers of different shapes, some without attention or feed-forward (NAS)",
        ("nemotron_nas",),
    ),
    Row(
        "JetVLM",
        "",
        "image, video",
        "vision: SigLIP, downsampling projector (as NVILA)",
        PLAIN,
        "gated linear attention (Jet-Nemotron)",
        (),
        'announced as "coming soon": no checkpoint to compare with, and transformers has no Jet-Nemotron, whose '
        "JetBlock (a gated delta rule with dynamic convolutions, arXiv:2508.15884) the runner would need",
    ),
)


def write(report: Sequence[Sequence[str]], types: Mapping[str, str]) -> str:
    """docs/models.md.

    Args:
        report: rows (family, test, detail, outcome) of the parity tests.
        types: model_type -> file of ``python_models/families``.
    """
    lines = [
        "# Models",
        "",
        "Written by `make models` from the registry and the results of the parity tests; see",
        "[models_table.py](models_table.py). *In process* counts comparisons of the parts and of the real stages with",
        "transformers' `generate` (tokens, logits, inputs), *served* those through tritonserver (tokens, log",
        "probabilities), each on tiny checkpoints with random weights; passed of all that ran.",
        "",
        "| model | family | takes | split | positions | special | proven by | missing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        family = ", ".join(f"`{name}`" for name in row.family.split(", ") if name) or "none"
        proof = _proof(report, row.tiny)
        cells = (row.ids, family, row.media, row.split, row.positions, row.special, proof, row.missing)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Model types with a family of their own", ""]
    lines += [f"- `{name}` ({place})" for name, place in sorted(types.items(), key=lambda item: item[0].lower())]
    shown = {name for row in ROWS for name in row.tiny}
    others = sorted({row[0] for row in report if not row[1].startswith(GENERIC)} - shown - {"builtin"})
    lines += ["", "Further checkpoints of the parity tests:", "", "| checkpoint | proven by |", "|---|---|"]
    lines += [f"| {name} | {_proof(report, (name,))} |" for name in others]
    return "\n".join(lines + _generic(report, types)) + "\n"


def _proof(report: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """How the tests of some checkpoints ended."""
    if not names:
        return "nothing"
    cells = []
    for title, served in (("in process", False), ("served", True)):
        rows = [row for row in report if row[0] in names and row[1].startswith("test_served") is served]
        ended = Counter(row[3] for row in rows if not row[1].startswith(GENERIC))
        counted = ended["passed"] + ended["failed"]
        cells.append(f"{title} {ended['passed']}/{counted}" if counted else f"{title}: not run")
    return f"{', '.join(f'`{name}`' for name in names)}: {', '.join(cells)}"


def _generic(report: Sequence[Sequence[str]], types: Mapping[str, str]) -> list[str]:
    rows = [row for row in report if row[1].startswith(GENERIC) and row[0] not in types]
    text = {row[0]: row[3] for row in rows if "rules" not in row[1]}
    media = {row[0]: row[3] for row in rows if "rules" in row[1]}
    tested = sorted({row[0] for row in report if not row[1].startswith(GENERIC)} & {*media})
    fit = sorted(name for name, ended in media.items() if ended == "passed" and name not in tested)
    exact = sorted(name for name, ended in text.items() if ended == "passed")
    unknown = sorted(name for name, ended in (media | text).items() if ended == "skipped" and name not in tested)
    failed = sorted(name for name, ended in (media | text).items() if ended == "failed")
    refused = sorted(
        (name, ended.removeprefix("refused: ").partition(" (model_type ")[0])
        for name, ended in (media | text).items()
        if ended.startswith("refused: ") and name not in tested
    )
    lines = [
        "",
        "## All others that transformers can load",
        "",
        "The generic adapter (`python_models/families/generic.py`) serves what follows transformers' usual way of",
        "mixing media, judged by the code of its forward passes, and refuses the rest with the reason.",
        "",
        f"- with media, the same tokens in a tiny size ({len(tested)}): {_names(tested)}",
        f"- taken by the rules, never run here ({len(fit)}): {_names(fit)}",
        f"- text alone, the same tokens in a tiny size ({len(exact)}): {_names(exact)}",
        f"- not judged, for want of a configuration that can be made without their files ({len(unknown)}): "
        f"{_names(unknown)}",
    ]
    if failed:
        lines.append(f"- failing ({len(failed)}): {_names(failed)}")
    lines += ["", f"Refused ({len(refused)}):", "", "| model_type | not supported because |", "|---|---|"]
    return lines + [f"| {name} | {reason.replace('|', '/')} |" for name, reason in refused]


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def main() -> None:
    """Command line."""
    from triptych.python_models.families.registry import family_files

    parser = argparse.ArgumentParser(description="Write docs/models.md.")
    parser.add_argument("--check", action="store_true", help="fail where it is not current")
    arguments = parser.parse_args()
    report = json.loads(REPORT.read_text()) if REPORT.is_file() else []
    text = write(report, family_files())
    if not arguments.check:
        TABLE.write_text(text)
    elif not TABLE.is_file() or TABLE.read_text() != text:
        raise SystemExit("docs/models.md is not current: run make models")


if __name__ == "__main__":
    main()
