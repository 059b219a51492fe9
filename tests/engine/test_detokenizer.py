"""Text comes out in complete characters, the same as decoding everything at once; stop strings are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.families import torchvision_fix
from triptych.python_models.language_model.engine.detokenizer import Detokenizer, Vocabulary

torchvision_fix.install()

import transformers  # noqa: E402

TEXT = "a bêté, 😀👩‍👩‍👧 漢字かな naïve  two  spaces \n\t end. ½ ﷽ Ω" * 3


def byte_level():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["abc the end of 漢"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def byte_fallback():
    """In the manner of SentencePiece: words begin with U+2581, what is unknown is spelled in bytes."""
    pieces = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz., "]
    raw = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request):
    return request.param()


def run(tokenizer, ids, **options):
    """Pieces of text, and what matched."""
    detokenizer = Detokenizer(Vocabulary(tokenizer), SamplingParams(**options))
    pieces = []
    for token in ids:
        piece = detokenizer.add(token)
        pieces.append(piece.text)
        if piece.matched_stop is not None:
            return pieces, piece.matched_stop
    return [*pieces, detokenizer.finish()], None


def test_pieces_add_up_and_characters_are_never_split(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces, _ = run(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "\ufffd" not in "".join(pieces)
    assert sum(1 for p in pieces if p) > 50


def with_added_tokens():
    made = byte_level()
    made.add_tokens(["<tool call>", "漢漢", "é", transformers.AddedToken("<|x|>", special=True)], special_tokens=False)
    return made


BYTE_LEVEL = with_added_tokens()


# beyond the end of the vocabulary too, as a padded head can give them
@given(ids=st.lists(st.integers(0, len(BYTE_LEVEL) + 3), max_size=120), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_tokens_give_the_text_of_decoding_at_once(ids, skip):
    pieces, _ = run(BYTE_LEVEL, ids, skip_special_tokens=skip)
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == whole


def test_bytes_that_never_become_a_character_come_out(tokenizer):
    start = tokenizer.convert_tokens_to_ids("<0x80>" if "<0x80>" in tokenizer.get_vocab() else "Ģ")
    pieces, _ = run(tokenizer, [start] * 300)
    assert "".join(pieces) == "\ufffd" * 300
    assert any(pieces[:100])


def test_special_tokens_are_left_out_unless_wanted(tokenizer):
    ids = [*tokenizer.encode("abc", add_special_tokens=False), tokenizer.eos_token_id]
    assert "<eos>" not in "".join(run(tokenizer, ids)[0])
    assert "".join(run(tokenizer, ids, skip_special_tokens=False)[0]).endswith("<eos>")


def test_a_stop_string_over_several_tokens_is_cut(tokenizer):
    ids = tokenizer.encode("a bc de fg hi", add_special_tokens=False)
    pieces, matched = run(tokenizer, ids, stop=("nothing", "e f"))
    assert matched == "e f"
    assert "".join(pieces) == "a bc d"
    # no part of it came out early
    assert all("e" not in piece for piece in pieces)


def test_the_earliest_stop_string_wins(tokenizer):
    ids = tokenizer.encode("abcdef", add_special_tokens=False)
    assert run(tokenizer, ids, stop=("cd", "b"))[1] == "b"


def test_what_only_looked_like_a_stop_string_comes_out(tokenizer):
    ids = tokenizer.encode("ab ab abc", add_special_tokens=False)
    pieces, matched = run(tokenizer, ids, stop=("abd",))
    assert matched is None
    assert "".join(pieces) == "ab ab abc"


def test_stop_strings_wait_for_min_tokens(tokenizer):
    ids = tokenizer.encode("x y x y x y", add_special_tokens=False)
    pieces, matched = run(tokenizer, ids, stop=("y",), min_tokens=len(ids) - 1)
    assert matched == "y"
    assert "".join(pieces) == "x y x y x "


def test_a_stop_string_within_a_multibyte_text(tokenizer):
    ids = tokenizer.encode("漢字😀かな", add_special_tokens=False)
    pieces, matched = run(tokenizer, ids, stop=("😀か",))
    assert matched == "😀か"
    assert "".join(pieces) == "漢字"


def test_bytes_of_single_tokens(tokenizer):
    names = Vocabulary(tokenizer)
    ids = tokenizer.encode("a😀漢", add_special_tokens=False)
    data = [names.data(i) for i in ids]
    assert None not in data
    assert bytes(b for part in data for b in part).decode().strip() == "a😀漢"
    partial = [i for i in ids if "\ufffd" in names.text(i)]
    assert partial
    assert names.data(tokenizer.eos_token_id) == tuple(b"<eos>")
