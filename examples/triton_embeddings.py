"""Vision embeddings as a service: pictures in, rows of the vision tower out, with nothing but tritonclient.

Two stages of the ensemble are called alone: ``preprocess`` makes features of picture files, ``vision_encoder`` rows of
features. Run beside a server (``triptych serve`` says its gRPC port when given --grpc-port):

    python examples/triton_embeddings.py --url 127.0.0.1:8001 examples/media/picture.png examples/media/two_a.jpg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
from numpy.typing import NDArray


def strings(name: str, values: list[bytes]) -> grpc.InferInput:
    """A STRING tensor."""
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    tensor = grpc.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def embed(client: grpc.InferenceServerClient, files: list[bytes], place: str) -> list[NDArray[np.float32]]:
    """Files of pictures (PNG, JPEG ...) -> [rows, width] of each. ``place`` stands for a picture in a prompt."""
    media = [{"type": "image", "blob": index} for index in range(len(files))]
    request = json.dumps({"prompt": {"text": place * len(files), "media": media}})
    ready = client.infer("preprocess", [strings("request", [request.encode()]), strings("media", files)])
    features = ready.as_numpy("vision_features")
    tensor = grpc.InferInput("vision_features", list(features.shape), "UINT8")
    tensor.set_data_from_numpy(features)
    found = client.infer("vision_encoder", [tensor])
    ends = np.cumsum(found.as_numpy("vision_rows"))[:-1]
    return np.split(found.as_numpy("vision_embeddings"), ends)


def main() -> int:
    """Print the shape of each picture's rows, and how much alike the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of Triton's gRPC endpoint")
    parser.add_argument("--place", default="<|vision_start|><|image_pad|><|vision_end|>", help="a picture in a prompt")
    parser.add_argument("pictures", nargs="+", type=Path)
    options = parser.parse_args()
    # a proxy of the environment would be in the way of a local connection
    with grpc.InferenceServerClient(options.url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        found = embed(client, [path.read_bytes() for path in options.pictures], options.place)
    means = np.stack([rows.mean(axis=0) for rows in found])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    for path, rows, alike in zip(options.pictures, found, means @ means.T, strict=True):
        sys.stdout.write(f"{path.name}: {rows.shape}, alike: {' '.join(f'{value:.3f}' for value in alike)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
