"""Asks a Triton server through tritonclient's gRPC streams, in an environment of its own; prints one JSON object.

python triton_client.py ask HOST:PORT picture.png "question"        the pieces and the figures of one answer
python triton_client.py cancel HOST:PORT COUNT                      how often a stream that was closed ended early
"""

import json
import queue
import sys
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc

ARRAYS = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32}


def tensor(name, kind, *values):
    value = grpc.InferInput(name, [len(values)], kind)
    value.set_data_from_numpy(np.array(values, ARRAYS[kind]))
    return value


class Stream:
    """One answer."""

    def __init__(self, address, *inputs):
        self.client, self.responses = grpc.InferenceServerClient(address), queue.Queue()
        self.client.start_stream(callback=lambda result, error: self.responses.put((result, error)))
        self.client.async_stream_infer("vlm", [*inputs, tensor("stream", "BOOL", True)], request_id="mine")

    def next(self):
        return self.responses.get(timeout=60)


def ask(address, picture, question):
    image = Path(picture).read_bytes()
    stream = Stream(address, tensor("text_input", "BYTES", question.encode()), tensor("images", "BYTES", image))
    pieces = []
    while True:
        result, error = stream.next()
        if error is not None:
            return {"error": str(error)}
        pieces.append(result.as_numpy("text_output")[0].decode())
        if result.as_numpy("token_ids") is not None:
            stream.client.stop_stream()
            return {
                "pieces": pieces,
                "token_ids": result.as_numpy("token_ids").tolist(),
                "id": result.get_response().id,
            }


def cancel(address, count):
    ended = 0
    for _ in range(int(count)):
        long = [tensor("max_tokens", "INT32", 1024), tensor("min_tokens", "INT32", 1024)]
        stream = Stream(address, tensor("text_input", "BYTES", b"hello"), *long)
        result, error = stream.next()
        assert error is None, error
        started = time.monotonic()
        stream.client.stop_stream(cancel_requests=True)
        ended += time.monotonic() - started < 2 and result is not None
    return {"ended": ended}


print(json.dumps({"ask": ask, "cancel": cancel}[sys.argv[1]](*sys.argv[2:])))
