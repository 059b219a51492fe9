"""Chat templates by name, rendered as transformers renders a checkpoint's own."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from triptych.python_models.families.loading import model_class
from triptych.python_models.families.templates import TEMPLATES

# of a conversation with a medium; the same with a system message, which must differ
ASKED = {
    "chatml": "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA fox.<|im_end|>\n"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
    "chatml-llava": "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA fox.<|im_end|>\n"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
    "chatml_direct": "<|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\nA fox.<|im_end|>"
    "<|im_start|>user\nWhere?<|im_end|><|im_start|>assistant\n",
    "gemma-it": "<bos><start_of_turn>user\nYou are a helpful assistant.\n\n<start_of_image>What?<end_of_turn>\n"
    "<start_of_turn>model\nA fox.<end_of_turn>\n<start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n",
    "internvl-2-5": "<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n<|im_start|>assistant\nA fox.<|im_end|>\n"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
    "kimi-vl": "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|><|im_user|>user<|im_middle|>"
    "<|media_start|>image<|media_content|><|media_pad|><|media_end|>What?<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>A fox.<|im_end|><|im_user|>user<|im_middle|>Where?<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>",
    "llama-2": "[INST] <image>\nWhat? [/INST] A fox. </s><s>[INST] Where? [/INST]",
    "llama-4": "<|begin_of_text|><|header_start|>user<|header_end|>\n\n<|image|>\nWhat?<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\nA fox.<|eot|><|header_start|>user<|header_end|>\n\nWhere?<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n",
    "llama_3_vision": "<|start_header_id|>user<|end_header_id|>\n\n<|image|>\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA fox.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Where?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llava_mistral_instruct": "[INST] <image>\nWhat? [/INST] A fox. </s>[INST] Where? [/INST]",
    "minicpmv": "<|im_start|>user\n(<image>./</image>)\nWhat?<|im_end|>\n<|im_start|>assistant\nA fox.<|im_end|>\n"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST][IMG]What?[/INST]A fox.</s>[INST]Where?[/INST]",
    "phi-4-mm": "<|user|><|endoftext10|>What?<|end|><|assistant|>A fox.<|end|><|user|>Where?<|end|><|assistant|>",
    "phi3-chat": "<|user|>\n<IMG_CONTEXT>\nWhat?<|end|><|assistant|>\nA fox.<|end|><|user|>\nWhere?<|end|>"
    "<|assistant|>\n",
    "qwen2-vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\nA fox.<|im_end|>\n"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
    "vicuna_v1.1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: A fox.</s>"
    "USER: Where? ASSISTANT:",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    return model_class("PreTrainedTokenizerFast")(tokenizer_object=Tokenizer(models.BPE()))


def render(tokenizer: Any, name: str, *turns: tuple[str, Any]) -> str:
    conversation = [{"role": role, "content": content} for role, content in turns]
    text = TEMPLATES[name].text
    return str(
        tokenizer.apply_chat_template(conversation, chat_template=text, add_generation_prompt=True, tokenize=False)
    )


def asked(medium: str = "image") -> list[tuple[str, Any]]:
    return [
        ("user", [{"type": medium}, {"type": "text", "text": "What?"}]),
        ("assistant", "A fox."),
        ("user", [{"type": "text", "text": "Where?"}]),
    ]


@pytest.mark.parametrize("name", ASKED)
def test_conversations(tokenizer: Any, name: str) -> None:
    found = render(tokenizer, name, *asked())
    assert found.endswith(ASKED[name])
    of_its_own = render(tokenizer, name, ("system", [{"type": "text", "text": "Be brief."}]), *asked())
    assert of_its_own.count("Be brief.") == 1
    assert of_its_own != found


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_text_and_names_its_end(tokenizer: Any, name: str) -> None:
    text = render(tokenizer, name, ("user", "{{ 7 * 6 }} <b>"))
    assert "{{ 7 * 6 }} <b>" in text, "what a user writes is no template"
    assert TEMPLATES[name].ends


def test_text_and_media_stay_in_their_order(tokenizer: Any) -> None:
    content = [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": "two"}, {"type": "video"}]
    assert "one <image>\ntwo<video>\n" in render(tokenizer, "chatml-llava", ("user", content))


def test_sounds_are_numbered_through_the_conversation(tokenizer: Any) -> None:
    sound = {"type": "audio"}
    text = render(tokenizer, "qwen2-audio", ("user", [sound, sound]), ("assistant", "yes"), ("user", [sound]))
    assert [text.count(f"Audio {k}: <|audio_bos|><|AUDIO|><|audio_eos|>\n") for k in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert text.index("Audio 2:") < text.index("yes") < text.index("Audio 3:")


def test_what_a_template_has_no_place_for_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="no place for media of type audio"):
        render(tokenizer, "vicuna_v1.1", *asked("audio"))
    with pytest.raises(TemplateError, match="not tool"):
        render(tokenizer, "vicuna_v1.1", ("user", "a"), ("tool", "b"))


def test_ends_are_those_the_tokenizer_has(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    assert TEMPLATES["chatml"].end_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert TEMPLATES["llama_3_vision"].end_ids(tokenizer) == frozenset()
