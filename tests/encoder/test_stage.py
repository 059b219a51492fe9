"""The encoder stages: batching, caching, and who pays for a failure."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.features import EncoderItem, pack
from triptych.python_models.contract.metrics import METRICS
from triptych.python_models.contract.request import MediaPart, Message
from triptych.python_models.contract.settings import Settings
from triptych.python_models.encoder.stage import AudioEncoderStage, EncoderStage, VisionEncoderStage
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Image, Medium

WIDTH = 4
WAIT_S = 30.0


class Answer:
    """A Responder that waits for the end."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, Any] | None = None
        self.error: TriptychError | None = None
        self.ends = 0
        self._end = threading.Event()

    def send(self, tensors: Mapping[str, Any], *, final: bool) -> None:
        assert final
        self.tensors = tensors
        self.ends += 1
        self._end.set()

    def fail(self, error: TriptychError) -> None:
        self.error = error
        self.ends += 1
        self._end.set()

    def ended(self, timeout: float = WAIT_S) -> bool:
        return self._end.wait(timeout)

    def rows(self) -> torch.Tensor:
        assert self.ended()
        assert self.error is None, self.error
        assert self.tensors is not None
        (rows,) = (tensor for name, tensor in self.tensors.items() if name.endswith("_embeddings"))
        assert isinstance(rows, torch.Tensor)
        return rows

    def failure(self) -> TriptychError:
        assert self.ended()
        assert self.error is not None
        return self.error


class Recorder:
    """A Telemetry that checks names and sums up."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self.seen: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def _key(self, name: str, kind: str, labels: Mapping[str, str]) -> str:
        assert METRICS[name].kind == kind
        assert set(labels) == set(METRICS[name].labels)
        return name + "".join(f"/{value}" for value in labels.values())

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        with self._lock:
            self.totals[self._key(name, "counter", labels)] += value  # type: ignore[assignment]

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self.gauges[self._key(name, "gauge", labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self.seen.setdefault(self._key(name, "histogram", labels), []).append(value)


class FakeEncoder:
    """Rows that tell which item they are of; stops in front of a gate."""

    width = WIDTH

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def encode(self, items: Sequence[EncoderItem]) -> list[torch.Tensor]:
        self.calls.append([item.digest for item in items])
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if any(item.digest.startswith("bad") for item in items):
            raise RuntimeError("no such thing")
        extra = {item.digest: item.digest.startswith("long") for item in items}
        return [torch.full((item.num_rows + extra[item.digest], WIDTH), value(item.digest)) for item in items]


def value(digest: str) -> float:
    return float(sum(map(ord, digest)))


class Setup:
    def __init__(self, **options: Any) -> None:
        self.encoder = FakeEncoder()
        self.telemetry = Recorder()
        settings = Settings(**({"mm_cache_size_mb": 1} | options))
        self.stage = VisionEncoderStage(settings, self.telemetry, "cpu", self.encoder)

    def submit(self, request_id: str, *digests: str, rows: int = 2) -> Answer:
        answer = Answer()
        items = [EncoderItem("image", d, rows, {"x": np.zeros(1, np.float32)}) for d in digests]
        self.stage.submit(request_id, {"vision_features": pack(items)}, answer)
        return answer

    def block(self) -> Answer:
        """Fill the worker with a request that waits for the gate."""
        self.encoder.gate.clear()
        answer = self.submit("blocker", "blocker")
        assert self.encoder.entered.acquire(timeout=WAIT_S)
        return answer

    def count(self, name: str) -> float:
        return self.telemetry.totals[f"triptych_{name}"]


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def setup(**options: Any) -> Setup:
        made.append(Setup(**options))
        return made[-1]

    yield setup
    for item in made:
        item.encoder.gate.set()
        item.stage.close()


def test_rows_in_item_order(make: Callable[..., Setup]) -> None:
    setup = make()
    rows = setup.submit("r", "b", "a", "b").rows()
    assert rows.shape == (6, WIDTH)
    assert rows.dtype == torch.float32
    assert rows[:, 0].tolist() == [value(d) for d in "bbaabb"]


def test_without_features_the_answer_waits_for_nothing(make: Callable[..., Setup]) -> None:
    setup = make()
    blocker = setup.block()
    for inputs in ({}, {"cancel": [b"nobody"]}, {"vision_features": np.empty(0, np.uint8)}):
        answer = Answer()
        setup.stage.submit("text", inputs, answer)
        # Answered before submit returned, in spite of the blocked worker.
        assert answer.ended(0)
        assert answer.tensors == {}
    assert not blocker.ended(0)


def test_requests_share_a_batch(make: Callable[..., Setup]) -> None:
    setup = make()
    blocker = setup.block()
    answers = {d: setup.submit(f"r{d}", d) for d in "abc"}
    setup.encoder.gate.set()
    blocker.rows()
    for digest, answer in answers.items():
        assert answer.rows()[:, 0].tolist() == [value(digest)] * 2
    assert setup.encoder.calls == [["blocker"], ["a", "b", "c"]]
    assert setup.telemetry.seen["triptych_batch_size"] == [1, 3]


def test_batches_are_bounded_by_rows(make: Callable[..., Setup]) -> None:
    setup = make(max_batch_rows=5)
    blocker = setup.block()
    answers = [setup.submit("1", "a"), setup.submit("2", "b"), setup.submit("3", "c"), setup.submit("4", "d", "e", "f")]
    setup.encoder.gate.set()
    for answer in [blocker, *answers]:
        answer.rows()
    # A request over the bound is cut between its items.
    assert setup.encoder.calls == [["blocker"], ["a", "b"], ["c"], ["d", "e"], ["f"]]


def test_an_item_over_the_bound_runs_alone(make: Callable[..., Setup]) -> None:
    setup = make(max_batch_rows=1)
    assert len(setup.submit("1", "a", "b").rows()) == 4
    assert setup.encoder.calls == [["a"], ["b"]]


def test_same_medium_is_encoded_once(make: Callable[..., Setup]) -> None:
    setup = make()
    setup.submit("1", "a", "a").rows()
    assert (setup.count("encoder_cache_misses_total"), setup.count("encoder_cache_hits_total")) == (1, 1)
    setup.submit("2", "a", "b").rows()
    assert setup.encoder.calls == [["a"], ["b"]]
    assert (setup.count("encoder_cache_misses_total"), setup.count("encoder_cache_hits_total")) == (2, 2)
    setup.submit("3", "b").rows()
    assert len(setup.encoder.calls) == 2


def test_cache_bytes_are_reported(make: Callable[..., Setup]) -> None:
    setup = make()
    setup.submit("1", "a").rows()
    setup.submit("2", "b").rows()
    # The gauge of a batch is set after its answers; the next batch has surely seen the first.
    assert setup.telemetry.gauges["triptych_encoder_cache_bytes"] >= 2 * WIDTH * 4


def test_a_flush_empties_the_cache(make: Callable[..., Setup]) -> None:
    setup = make()
    setup.submit("1", "a").rows()
    answer = Answer()
    setup.stage.flush(answer)
    assert answer.ended()
    assert (answer.tensors, answer.error) == ({}, None)
    setup.submit("2", "a").rows()
    assert setup.encoder.calls == [["a"], ["a"]]
    setup.stage.close()
    late = Answer()
    setup.stage.flush(late)
    assert late.failure().kind is ErrorKind.STAGE_DEAD


def test_cache_off(make: Callable[..., Setup]) -> None:
    setup = make(mm_cache_size_mb=0)
    setup.submit("1", "a", "a").rows()
    setup.submit("2", "a").rows()
    assert setup.encoder.calls == [["a"], ["a"]]
    assert setup.telemetry.gauges["triptych_encoder_cache_bytes"] == 0


def test_same_medium_in_two_requests_of_a_batch(make: Callable[..., Setup]) -> None:
    setup = make(mm_cache_size_mb=0)
    blocker = setup.block()
    answers = [setup.submit("1", "a", "b"), setup.submit("2", "b", "c")]
    setup.encoder.gate.set()
    blocker.rows()
    assert [a.rows()[:, 0].tolist() for a in answers] == [[value(d) for d in t] for t in ("aabb", "bbcc")]
    assert setup.encoder.calls[1:] == [["a", "b", "c"]]


def test_only_the_bad_request_fails(make: Callable[..., Setup]) -> None:
    setup = make()
    blocker = setup.block()
    first, bad, last = setup.submit("1", "a"), setup.submit("2", "c", "bad"), setup.submit("3", "b", "c")
    setup.encoder.gate.set()
    blocker.rows()
    assert first.rows()[:, 0].tolist() == [value("a")] * 2
    assert last.rows()[:, 0].tolist() == [value(d) for d in "bbcc"]
    error = bad.failure()
    assert error.kind is ErrorKind.STAGE_FAILED
    assert error.stage == "vision_encoder"
    assert "request 2" in error.message
    assert "no such thing" in error.message
    assert setup.count("requests_total/ok") == 3
    assert setup.count("requests_total/stage_failed") == 1
    # And the stage goes on.
    assert len(setup.submit("4", "d").rows()) == 2


def test_a_lone_bad_request_is_not_run_twice(make: Callable[..., Setup]) -> None:
    setup = make()
    assert setup.submit("1", "bad").failure().kind is ErrorKind.STAGE_FAILED
    assert setup.encoder.calls == [["bad"]]


def test_wrong_number_of_rows(make: Callable[..., Setup]) -> None:
    setup = make()
    error = setup.submit("1", "long").failure()
    assert error.kind is ErrorKind.STAGE_FAILED
    assert "(3, 4) where (2, 4) were expected" in error.message
    assert setup.submit("2", "long").failure().kind is ErrorKind.STAGE_FAILED, "nothing wrong may be cached"


@pytest.mark.parametrize("features", [np.zeros(20, np.uint8), pack([])])
def test_broken_features(make: Callable[..., Setup], features: Any) -> None:
    setup = make()
    answer = Answer()
    setup.stage.submit("1", {"vision_features": features}, answer)
    assert answer.failure().kind is ErrorKind.INVALID_REQUEST
    assert len(setup.submit("2", "a").rows()) == 2


def test_cancel_of_a_waiting_request(make: Callable[..., Setup]) -> None:
    setup = make()
    blocker = setup.block()
    gone, stays, nameless = setup.submit("gone", "a"), setup.submit("stays", "b"), setup.submit("", "c")
    control = Answer()
    setup.stage.submit("", {"cancel": [b"gone", b"", b"unknown"]}, control)
    assert control.tensors == {}
    assert gone.failure().kind is ErrorKind.CANCELLED
    setup.encoder.gate.set()
    for answer in (blocker, stays, nameless):
        answer.rows()
    assert setup.encoder.calls[1:] == [["b", "c"]]


def test_cancel_of_a_running_request(make: Callable[..., Setup]) -> None:
    setup = make()
    blocker = setup.block()
    setup.stage.cancel(["blocker"])
    assert blocker.failure().kind is ErrorKind.CANCELLED
    setup.encoder.gate.set()
    assert len(setup.submit("2", "a").rows()) == 2
    assert blocker.ends == 1


def test_cancel_between_the_items_of_a_request(make: Callable[..., Setup]) -> None:
    setup = make(max_batch_rows=2)
    setup.encoder.gate.clear()
    answer = setup.submit("1", "a", "b", "c")
    assert setup.encoder.entered.acquire(timeout=WAIT_S)
    setup.stage.cancel(["1"])
    assert answer.failure().kind is ErrorKind.CANCELLED
    setup.encoder.gate.set()
    setup.submit("2", "d").rows()
    assert setup.encoder.calls == [["a"], ["d"]]


def test_close_ends_every_request(make: Callable[..., Setup]) -> None:
    setup = make()
    blocker = setup.block()
    waiting = setup.submit("1", "a")
    closer = threading.Thread(target=setup.stage.close)
    closer.start()
    assert blocker.failure().kind is ErrorKind.STAGE_DEAD
    assert waiting.failure().kind is ErrorKind.STAGE_DEAD
    setup.encoder.gate.set()
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert setup.submit("2", "b").failure().kind is ErrorKind.STAGE_DEAD
    assert setup.encoder.calls == [["blocker"]]


def test_gauges(make: Callable[..., Setup]) -> None:
    setup = make()
    blocker = setup.block()
    waiting = setup.submit("1", "a")
    assert setup.telemetry.gauges["triptych_requests_running"] == 1
    assert setup.telemetry.gauges["triptych_requests_waiting"] == 1
    setup.encoder.gate.set()
    blocker.rows()
    waiting.rows()
    assert len(setup.telemetry.seen["triptych_stage_seconds"]) == 2


# --- with a real encoder


def prepared_items(folder: Path) -> list[EncoderItem]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    medium = Medium("image", Image(PILImage.fromarray(pixels)), "d", "messages[0]")
    preprocessor = load_family(Settings(model=str(folder))).load_preprocessor()
    return preprocessor.prepare([Message("user", (MediaPart("image", blob=0),))], [medium]).features["vision"]


def run(stage: EncoderStage, items: Sequence[EncoderItem]) -> Answer:
    answer = Answer()
    stage.submit("r", {f"{stage.encoder_name}_features": pack(items)}, answer)
    answer.ended()
    return answer


def test_real_encoder(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    items = prepared_items(folder)
    stage = VisionEncoderStage(Settings(model=str(folder)), Recorder(), "cpu")
    try:
        answer = run(stage, items)
        assert answer.tensors is not None
        assert list(answer.tensors) == ["vision_embeddings", "vision_rows"]
        expected = load_family(Settings(model=str(folder))).load_encoder("vision", "cpu", torch.float32).encode(items)
        assert torch.equal(answer.rows(), expected[0])
        assert answer.rows().is_contiguous()
    finally:
        stage.close()


def test_float32_on_cpu_whatever_the_model_computes_in(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    stage = VisionEncoderStage(Settings(model=str(folder), dtype="bfloat16"), Recorder(), "cpu")
    try:
        assert run(stage, prepared_items(folder)).rows().dtype == torch.float32
    finally:
        stage.close()


def test_checkpoint_without_this_encoder(tiny_checkpoint: Callable[[str], Path]) -> None:
    stage = AudioEncoderStage(Settings(model=str(tiny_checkpoint("qwen2_5_vl"))), Recorder(), "cpu")
    try:
        text = Answer()
        stage.submit("text", {}, text)
        assert text.tensors == {}
        error = run(stage, [EncoderItem("audio", "d", 1, {"mel": np.zeros((16, 8), np.float32)})]).failure()
        assert error.kind is ErrorKind.UNSUPPORTED
        assert "no audio encoder" in error.message
    finally:
        stage.close()


@pytest.mark.gpu
def test_embeddings_stay_on_the_gpu(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("qwen2_5_vl")
    items = prepared_items(folder)
    stage = VisionEncoderStage(Settings(model=str(folder), dtype="bfloat16"), Recorder(), "cuda:0")
    try:
        rows = run(stage, items).rows()
        assert rows.device.type == "cuda"
        assert rows.dtype == torch.bfloat16
        assert rows.is_contiguous()
        expected = load_family(Settings(model=str(folder))).load_encoder("vision", "cpu", torch.float32).encode(items)
        torch.testing.assert_close(rows.float().cpu(), expected[0], atol=0.1, rtol=0.1)
    finally:
        stage.close()


def test_without_media_no_encoder_is_loaded(tiny_checkpoint: Callable[[str], Path]) -> None:
    settings = Settings(model=str(tiny_checkpoint("qwen2_5_vl")), enable_multimodal="off")
    stage = VisionEncoderStage(settings, Recorder(), "cpu")
    try:
        assert stage._encoder is None
    finally:
        stage.close()


def test_cuda_ipc_needs_a_gpu() -> None:
    with pytest.raises(TriptychError, match="needs a GPU") as caught:
        Setup(mm_feature_transport="cuda_ipc")
    assert caught.value.param == "settings.mm_feature_transport"


@pytest.mark.gpu
@pytest.mark.parametrize(("transport", "kind"), [("auto", "cuda"), ("cuda_ipc", "cuda"), ("cpu", "cpu")])
@pytest.mark.parametrize("on_device", [True, False])
def test_transport_of_embeddings(transport: str, kind: str, on_device: bool) -> None:
    class OnGpu(FakeEncoder):
        def encode(self, items: Sequence[EncoderItem]) -> list[torch.Tensor]:
            return [rows.cuda() for rows in super().encode(items)]

    settings = Settings(mm_feature_transport=transport, keep_mm_feature_on_device=on_device)
    stage = VisionEncoderStage(settings, Recorder(), "cuda:0", OnGpu())
    try:
        for _ in range(2):
            answer = Answer()
            item = EncoderItem("image", "a", 2, {"x": np.zeros(1, np.float32)})
            stage.submit("1", {"vision_features": pack([item])}, answer)
            assert answer.rows().device.type == kind
            assert answer.rows()[:, 0].tolist() == [value("a")] * 2
        ((kept, _),) = stage._cache._entries.values()
        assert isinstance(kept, torch.Tensor)
        assert kept.device.type == ("cuda" if on_device else "cpu")
    finally:
        stage.close()
