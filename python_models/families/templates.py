"""Chat templates by name: those of checkpoints that bring none along, and what ``--chat-template`` may name.

The names are SGLang's (github.com/sgl-project/sglang), LLaVA's and those of InternVL's config.json. They follow the
published conversation formats in roles, separators and default system messages, such as those of haotian-liu/LLaVA,
LLaVA-VL/LLaVA-NeXT, OpenGVLab/InternVL and deepseek-ai/Janus, DeepSeek-VL2 and DeepSeek-OCR. Text and media of a
message stay in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..contract.errors import invalid
from ..contract.settings import Settings

Frame = tuple[str, str]
"""What stands before and after."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokens that end its answers.

    Attributes:
        text: Jinja, rendered with ``messages`` and ``add_generation_prompt``. One of a name takes ``places`` too, what
            to write for a medium of a modality in place of what it has for it.
        ends: special tokens.
    """

    text: str
    ends: tuple[str, ...]

    def end_ids(self, tokenizer: Any) -> frozenset[int]:
        """Ids of :attr:`ends`; one that the tokenizer lacks plays no part."""
        known = tokenizer.get_vocab()
        return frozenset(int(known[token]) for token in self.ends if token in known)

    def end_strings(self, tokenizer: Any) -> tuple[str, ...]:
        """The others of :attr:`ends`: an answer can only end with their characters."""
        known = tokenizer.get_vocab()
        return tuple(token for token in self.ends if token not in known)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _chat(
    frames: Sequence[Frame],
    answer: str,
    media: Mapping[str, str],
    *,
    begin: str = "",
    default: str = "",
    inside: bool = False,
    strip: bool = False,
) -> str:
    """A template of alternating turns.

    Args:
        frames: around messages of the system, the user and the assistant.
        answer: what the assistant's answer follows on.
        media: modality -> what stands for a medium; ``{index}`` in it counts those of the conversation from 1.
        begin: of the prompt.
        default: system message where the conversation has none; an empty one is left out with its frame.
        inside: the system message stands in the first user's message.
        strip: white space around messages is left out.
    """
    system, user, assistant = frames
    places = "".join(f"{{%- elif part['type'] == {_quote(m)} -%}}{_place(text)}" for m, text in media.items())
    body = (
        "{%- set media = namespace(count=0) -%}"
        "{%- macro written(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
        "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
        "{%- elif places is defined and part['type'] in places -%}{{ places[part['type']] }}"
        + places
        + "{%- else -%}{{ raise_exception('this template has no place for media of type ' + part['type']) }}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        f"{{%- macro body(content) -%}}{{{{ written(content){' | trim' if strip else ''} }}}}{{%- endmacro -%}}"
    )
    head = (
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set system, turns = body(messages[0]['content']), messages[1:] -%}"
        f"{{%- else -%}}{{%- set system, turns = {_quote(default)}, messages -%}}{{%- endif -%}}"
        f"{{%- if system -%}}{{%- set system = {_quote(system[0])} + system + {_quote(system[1])} -%}}{{%- endif -%}}"
        f"{{{{ {_quote(begin)} }}}}"
    )
    first = "(system if loop.first else '') + " if inside else ""
    turns = (
        "{%- for m in turns -%}{%- if m['role'] == 'user' -%}"
        f"{{{{ {_quote(user[0])} + {first}body(m['content']) + {_quote(user[1])} }}}}"
        "{%- elif m['role'] == 'assistant' -%}"
        f"{{{{ {_quote(assistant[0])} + body(m['content']) + {_quote(assistant[1])} }}}}"
        "{%- else -%}"
        "{{ raise_exception('this template has roles system (first), user and assistant, not ' + m['role']) }}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {_quote(answer)} }}}}{{%- endif -%}}"
    )
    return body + head + ("" if inside else "{{ system }}") + turns


def _place(text: str) -> str:
    before, count, after = text.partition("{index}")
    if not count:
        return f"{{{{ {_quote(text)} }}}}"
    numbered = f"{_quote(before)} ~ media.count ~ {_quote(after)}"
    return f"{{%- set media.count = media.count + 1 -%}}{{{{ {numbered} }}}}"


_LLAVA = {"image": "<image>\n", "video": "<video>\n"}
_INTERNVL = {"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}
_QWEN2_VL = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
_MINICPM = {"image": "(<image>./</image>)\n", "video": "(<video>./</video>)", "audio": "(<audio>./</audio>)"}
_HELPFUL = "You are a helpful assistant."
_SEEING = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_DEEPSEEK_BEGIN, _DEEPSEEK_END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# As the checkpoints were trained: "You are the multimodal model of Shanghai AI Laboratory and SenseTime, called
# InternVL, a useful and harmless assistant", and that of version 2.5.
_INTERNVL_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _turns(before: str, after: str, end: str, media: Mapping[str, str], **options: Any) -> str:
    """Turns that begin with their role's name, between ``before`` and ``after``, and have one ``end``."""
    names = [f"{before}{role}{after}" for role in ("system", "user", "assistant")]
    return _chat([(name, end) for name in names], names[-1], media, **options)


def _chatml(end: str, media: Mapping[str, str], default: str) -> str:
    """ChatML; ``end`` of a message."""
    return _turns("<|im_start|>", "\n", end, media, default=default)


def _llama_3(media: Mapping[str, str]) -> str:
    head = "<|start_header_id|>", "<|end_header_id|>\n\n"
    return _turns(*head, "<|eot_id|>", media, begin="<|begin_of_text|>", default=_SEEING, strip=True)


def _deepseek(assistant: str, image: str, *, gap: str = "", default: str = "") -> str:
    """``gap`` stands behind a system message."""
    frames = [("", gap), ("<|User|>: ", "\n\n"), (assistant, _DEEPSEEK_END)]
    media = {"image": f"{image}\n"}
    return _chat(frames, "<|Assistant|>:", media, begin=_DEEPSEEK_BEGIN, default=default, strip=True)


_ENDS_CHATML = ("<|im_end|>", "<|endoftext|>")
_ENDS_LLAMA_3 = ("<|eot_id|>", "<|end_of_text|>")

TEMPLATES: dict[str, ChatTemplate] = {
    "chatml": ChatTemplate(_chatml("<|im_end|>\n", _LLAVA, _HELPFUL), _ENDS_CHATML),
    "chatml-llava": ChatTemplate(_chatml("<|im_end|>\n", _LLAVA, _HELPFUL), _ENDS_CHATML),
    "chatml_direct": ChatTemplate(_chatml("<|im_end|>", _LLAVA, "Answer the questions."), _ENDS_CHATML),
    # no conversation: pictures, a line each, and an instruction
    "deepseek-ocr": ChatTemplate(
        _chat([("", "")] * 3, "", {"image": "<image>\n"}, begin=_DEEPSEEK_BEGIN, strip=True),
        (_DEEPSEEK_END,),
    ),
    "deepseek-vl2": ChatTemplate(_deepseek("<|Assistant|>:", "<image>"), (_DEEPSEEK_END,)),
    "gemma-it": ChatTemplate(
        _chat(
            [("", "\n\n"), ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n")],
            "<start_of_turn>model\n",
            {"image": "<start_of_image>", "audio": "<start_of_audio>"},
            begin="<bos>",
            default=_HELPFUL,
            inside=True,
        ),
        ("<end_of_turn>",),
    ),
    "internlm2-chat": ChatTemplate(_chatml("<|im_end|>", _INTERNVL, _INTERNVL_2), ("<|im_end|>",)),
    "internvl-2-5": ChatTemplate(_chatml("<|im_end|>\n", _INTERNVL, _INTERNVL_2_5), ("<|im_end|>",)),
    "janus-pro": ChatTemplate(
        _deepseek("<|Assistant|>: ", "<image_placeholder>", gap="\n\n", default=_SEEING), (_DEEPSEEK_END,)
    ),
    "kimi-vl": ChatTemplate(
        _chat(
            [
                ("<|im_system|>system<|im_middle|>", "<|im_end|>"),
                ("<|im_user|>user<|im_middle|>", "<|im_end|>"),
                ("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
            ],
            "<|im_assistant|>assistant<|im_middle|>",
            {"image": "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"},
            default="You are a helpful assistant",
        ),
        ("<|im_end|>",),
    ),
    "llama-2": ChatTemplate(
        _chat(
            [("<<SYS>>\n", "\n<</SYS>>\n\n"), ("[INST] ", " "), ("[/INST] ", " </s><s>")],
            "[/INST]",
            _LLAVA,
            inside=True,
        ),
        ("</s>",),
    ),
    "llama-4": ChatTemplate(
        _turns(
            "<|header_start|>",
            "<|header_end|>\n\n",
            "<|eot|>",
            {"image": "<|image|>\n"},
            begin="<|begin_of_text|>",
            strip=True,
        ),
        ("<|eot|>", "<|eom|>", "<|end_of_text|>"),
    ),
    "llama_3_vision": ChatTemplate(_llama_3({"image": "<|image|>\n"}), _ENDS_LLAMA_3),
    "llava_llama_3": ChatTemplate(_llama_3(_LLAVA), _ENDS_LLAMA_3),
    "llava_mistral_instruct": ChatTemplate(
        _chat([("<<SYS>>\n", "\n<</SYS>>\n\n"), ("[INST] ", " [/INST]"), (" ", " </s>")], "", _LLAVA, inside=True),
        ("</s>",),
    ),
    "minicpmo": ChatTemplate(
        _chatml("<|im_end|>\n", _MINICPM, f"You are Qwen, created by Alibaba Cloud. {_HELPFUL}"), _ENDS_CHATML
    ),
    "minicpmv": ChatTemplate(_chatml("<|im_end|>\n", _MINICPM, _HELPFUL), _ENDS_CHATML),
    "mistral": ChatTemplate(
        _chat(
            [("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]"), ("", "</s>")],
            "",
            {"image": "[IMG]"},
            begin="<s>",
        ),
        ("</s>",),
    ),
    "phi-4-mm": ChatTemplate(
        _turns("<|", "|>", "<|end|>", {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}), ("<|end|>",)
    ),
    "phi3-chat": ChatTemplate(_turns("<|", "|>\n", "<|end|>", _INTERNVL, default=_INTERNVL_2), ("<|end|>",)),
    "points-v15-chat": ChatTemplate(_chatml("<|im_end|>\n", _QWEN2_VL, ""), ("<|im_end|>",)),
    "qwen2-audio": ChatTemplate(
        _chatml("<|im_end|>\n", {"audio": "Audio {index}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"}, _HELPFUL),
        ("<|im_end|>",),
    ),
    "qwen2-vl": ChatTemplate(_chatml("<|im_end|>\n", _QWEN2_VL, _HELPFUL), ("<|im_end|>",)),
    "vicuna_v1.1": ChatTemplate(
        _chat([("", " "), ("USER: ", " "), ("ASSISTANT: ", "</s>")], "ASSISTANT:", _LLAVA, default=_CURIOUS), ("</s>",)
    ),
}
# The same formats under the names that InternVL's config.json gives them; Hermes 2 writes as InternLM 2 does.
TEMPLATES |= {"Hermes-2": TEMPLATES["internlm2-chat"], "internvl2_5": TEMPLATES["internvl-2-5"]}

OWN = ("", "glm-4v")
"""Names of the checkpoint's own template; SGLang's documentation gives GLM-4.5V's this one."""


def chosen(settings: Settings) -> ChatTemplate | None:
    """The template that ``--chat-template`` asks for; None for the checkpoint's own.

    Raises:
        TriptychError: INVALID_REQUEST for a name or file that is not there, or a file that is no template.
    """
    name, where = settings.chat_template, "settings.chat_template"
    if name in OWN:
        return None
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja"):
        near = get_close_matches(name, TEMPLATES, n=1)
        hint = f"; did you mean {near[0]!r}? Else" if near else ""
        known = ", ".join(sorted((*TEMPLATES, *filter(None, OWN)), key=str.lower))
        raise invalid(f"there is no chat template {name!r}{hint or ';'} give a .jinja file, or one of {known}", where)
    try:
        return ChatTemplate(_checked(Path(name).expanduser().read_text(encoding="utf-8"), name), ())
    except (OSError, UnicodeDecodeError) as error:
        raise invalid(f"the chat template {name} cannot be read: {error}", where) from None


def inputs_of(template: str | Mapping[str, str]) -> frozenset[str]:
    """What a checkpoint's template, or any of several, reads beside what transformers always gives one."""
    texts = [template] if isinstance(template, str) else template.values()
    return frozenset[str]().union(*map(variables_of, texts)) - _GIVEN


_GIVEN = frozenset(
    {"places", "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"}
)


def variables_of(text: str) -> frozenset[str]:
    """Names that a template reads and does not set itself.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """
    from jinja2 import Environment, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    # a tag of transformers' around answers
    return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", text))))


_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def _checked(text: str, name: str) -> str:
    from jinja2 import TemplateSyntaxError

    try:
        found = variables_of(text)
    except TemplateSyntaxError as error:
        message = f"the chat template {name} is not valid: {error} (line {error.lineno})"
        raise invalid(message, "settings.chat_template") from None
    if "messages" not in found:
        raise invalid(f"the chat template {name} does not read messages", "settings.chat_template")
    return text
