"""GLM-V: pictures and videos in one prompt, which transformers' own forward cannot; frames of a video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from triptych.python_models.media.video import VideoInfo, frame_indices

NAMES = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")


@pytest.fixture(scope="module", params=NAMES)
def glm(request: pytest.FixtureRequest, make_parts: Callable[[str], Any]) -> Any:
    return make_parts(request.param)


def test_pictures_and_videos_in_one_prompt(glm: Any) -> None:
    """Against the whole model's own modules, with the rows of each modality where its token types say."""
    make = glm.make
    chat = make.turns(
        ("user", make.video(4), make.image(1), "first ", make.video(5, frames=6, duration=5.0), "which?"),
        ("assistant", "none"),
        ("user", make.image(2, 90, 33), "and here?"),
    )
    inputs = glm.reference_inputs(chat)
    base = glm.whole.model
    types = inputs["mm_token_type_ids"][0]
    with torch.no_grad():
        embeddings = base.get_input_embeddings()(inputs["input_ids"])
        image = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        video = base.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
        embeddings[0, types == 1] = torch.cat(image.pooler_output)
        embeddings[0, types == 2] = torch.cat(video.pooler_output)
        position_ids, _ = base.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"]
        )
        hidden = base.language_model(inputs_embeds=embeddings, position_ids=position_ids).last_hidden_state
        expected = glm.whole.lm_head(hidden)[0]
    prepared = glm.prepare(chat)
    assert prepared.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert prepared.position_ids.tolist() == position_ids[:, 0].tolist()
    # a video has a run of tokens for every pair of frames
    assert [len(item.spans) for item in prepared.items] == [2, 1, 3, 1]
    torch.testing.assert_close(glm.logits(prepared), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seconds", [1.0, 12.0, 31.0, 100.0, 400.0])
def test_as_many_frames_as_the_processor_takes(glm: Any, seconds: float) -> None:
    from transformers.video_utils import VideoMetadata

    frames = int(seconds * 25)
    sampling = glm.preprocessor.frame_sampling
    found = frame_indices(VideoInfo("mov", 64, 48, 0, frames, seconds, 25.0), sampling, glm.settings.max_video_frames)
    metadata = VideoMetadata(total_num_frames=frames, fps=25.0, duration=seconds)
    expected = glm.processor.video_processor.sample_frames(metadata)
    assert abs(len(found) - len(expected)) <= 2
