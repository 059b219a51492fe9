"""The ensemble ``generate`` over a gRPC stream, with the tensors of Triton's vLLM backend.

The same code talks to that backend, whose model is another name and whose pictures must be base64:

    python examples/triton_generate.py --url 127.0.0.1:8001 --image examples/media/picture.png "How many shapes?"
"""

from __future__ import annotations

import argparse
import base64
import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc


def tensor(name: str, value: bytes | bool) -> grpc.InferInput:
    """A tensor of one element."""
    made = grpc.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES")
    made.set_data_from_numpy(np.array([value], dtype=np.bool_ if isinstance(value, bool) else np.object_))
    return made


def main() -> int:
    """Print the answer as it comes, then why it ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of Triton's gRPC endpoint")
    parser.add_argument("--model", default="generate")
    parser.add_argument("--image", type=Path, help="a picture, put before the question")
    parser.add_argument("--place", default="<|vision_start|><|image_pad|><|vision_end|>", help="a picture in a prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("question")
    options = parser.parse_args()
    prompt = f"{options.place if options.image else ''}{options.question}"
    # no chat template is applied here: write the one that the model was trained with
    prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    inputs = [
        tensor("text_input", prompt.encode()),
        tensor("stream", True),
        tensor("sampling_parameters", json.dumps({"temperature": 0, "max_tokens": options.max_tokens}).encode()),
        tensor("return_finish_reason", True),
    ]
    if options.image:
        inputs.append(tensor("image", base64.b64encode(options.image.read_bytes())))
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # a proxy of the environment would be in the way of a local connection
    with grpc.InferenceServerClient(options.url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        client.async_stream_infer(options.model, inputs)
        reason = "None"
        while reason == "None":
            result = results.get()
            if isinstance(result, Exception):
                sys.stderr.write(f"\n{result}\n")
                return 1
            sys.stdout.write(result.as_numpy("text_output")[0].decode())
            sys.stdout.flush()
            reason = result.as_numpy("finish_reason")[0].decode()
        client.stop_stream()
    sys.stdout.write(f"\n({reason})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
