"""Ask a running server with Triton's client: once over HTTP, and exit by exit over gRPC.

    impatient serve impatient-demo --grpc-port 8001
    python examples/serving/ask.py

Needs tritonclient[http,grpc].
"""

import argparse
import queue
import sys

import numpy as np
import tritonclient.grpc as rpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException


def zeros(module, told):
    """Make one sample of zeros of each input that the metadata name."""
    tensors = []
    for entry in told:
        shape = [1, *(max(int(size), 1) for size in entry["shape"][1:])]
        array = np.zeros(shape, {"INT64": "int64", "UINT8": "uint8"}.get(entry["datatype"], "f4"))
        tensors.append(module.InferInput(entry["name"], shape, entry["datatype"]))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def ask_once(address, model, deadline_ms):
    """Take the best answer until the deadline."""
    client = http.InferenceServerClient(address)
    told = client.get_model_metadata(model)
    classes = told["parameters"]["class_names"]
    # Triton's clients say a timeout in microseconds.
    reply = client.infer(model, zeros(http, told["inputs"]), timeout=round(1000 * deadline_ms))
    facts = reply.get_response()["parameters"]
    client.close()
    print(
        f"{classes[reply.as_numpy('output')[0].argmax()]}: exit {facts['exit']} of "
        f"{facts['n_exits'] - 1} after {facts['elapsed_ms']:.1f} ms, stopped by "
        f"{facts['stopped_by']}"
    )


def ask_for_every_exit(address, model, deadline_ms):
    """Take the answers of all exits as they come."""
    answers = queue.Queue()
    with rpc.InferenceServerClient(address) as client:
        told = client.get_model_metadata(model, as_json=True)
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            model, zeros(rpc, told["inputs"]), timeout=round(1000 * deadline_ms)
        )
        while True:
            reply, error = answers.get(timeout=10)
            if error is not None:
                raise error
            facts = reply.get_response().parameters
            chosen = reply.as_numpy("output")[0].argmax()
            print(f"class {chosen} by exit {facts['exit'].int64_param}")
            if facts["triton_final_response"].bool_param:
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", default="localhost:8000")
    parser.add_argument("--grpc", default="localhost:8001")
    parser.add_argument("--model", default="impatient-demo")
    parser.add_argument("--deadline-ms", type=float, default=50.0)
    args = parser.parse_args()
    try:
        ask_once(args.http, args.model, args.deadline_ms)
        ask_for_every_exit(args.grpc, args.model, args.deadline_ms)
    except ConnectionRefusedError:
        sys.exit(f"no server at {args.http}; start one with: impatient serve DIR --grpc-port 8001")
    except InferenceServerException as error:
        # what a server says, or that there is none
        unreachable = error.status() == "StatusCode.UNAVAILABLE"
        start = f"nothing answers over gRPC at {args.grpc}; start the server with --grpc-port 8001"
        sys.exit(start if unreachable else str(error))


if __name__ == "__main__":
    main()
