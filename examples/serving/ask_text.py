"""Ask a running server of texts, of any lengths, with nothing but the tokenizer.

    impatient serve runs/reviews
    python examples/serving/ask_text.py mytokenizer "a lovely place" "cold and late"

Needs transformers.
"""

import argparse
import json
from urllib.request import Request, urlopen

from transformers import AutoTokenizer


def ask(address, model, tokenizer, texts, deadline_ms):
    """Take the best answers until the deadline, one row of numbers for each text."""
    # The shorter texts of one request are filled up; requests may differ in length.
    tokens = tokenizer(texts, padding=True, return_tensors="np")
    inputs = [
        {"name": name, "datatype": "INT64", "shape": ids.shape, "data": ids.ravel().tolist()}
        for name, ids in tokens.items()
    ]
    body = json.dumps({"parameters": {"deadline_ms": deadline_ms}, "inputs": inputs})
    with urlopen(Request(f"http://{address}/v2/models/{model}/infer", body.encode())) as reply:
        answer = json.load(reply)
    numbers = answer["outputs"][0]["data"]
    width = len(numbers) // len(texts)
    rows = [numbers[start : start + width] for start in range(0, len(numbers), width)]
    return rows, answer["parameters"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="a name, or a folder")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--http", default="localhost:8000")
    parser.add_argument("--model", default="reviews")
    parser.add_argument("--deadline-ms", type=float, default=50.0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows, facts = ask(args.http, args.model, tokenizer, args.texts, args.deadline_ms)
    for text, row in zip(args.texts, rows, strict=True):
        print(f"{text}: {row}")
    print(f"exit {facts['exit']} after {facts['elapsed_ms']:.1f} ms")
