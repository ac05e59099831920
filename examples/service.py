"""A GPT-2 HTTP service in Python. It needs onnxruntime, numpy and tokenizers, but neither PyTorch nor gpt2x.

    gpt2x export models/124M --onnx gpt2-onnx/
    python examples/service.py gpt2-onnx/ --port 8000 --threads 2
    curl -N localhost:8000 -d '{"prompt": "ROMEO:", "max_new_tokens": 40, "temperature": 0.8, "top_k": 40, "seed": 1}'

All precisions and kinds of cache work. `--model onnx/model_q4.onnx` selects one of several models.
The response is streamed while the text is generated.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

MODELS = ("model.onnx", "model_quantized.onnx", "model_int8.onnx", "model_q4.onnx", "model_fp16.onnx")
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class Model:
    """The ONNX model and its tokenizer."""

    def __init__(self, directory: Path, model: str | None, threads: int) -> None:
        file = find(directory, *([model] if model else [f"onnx/{name}" for name in MODELS]))
        self.tokenizer = Tokenizer.from_file(str(find(directory, "tokenizer.json")))
        self.config = json.loads(find(directory, "config.json").read_text())
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(file), options)
        self.caches = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.outputs = ["logits", *(i.name.replace("past_key_values", "present") for i in self.caches)]

    def tokens(self, prompt: list[int], count: int, temperature: float, top_k: int, seed: Any) -> Iterator[int]:
        """Yield token ids: prefill the prompt, then decode one token per run with the KV cache."""
        context = self.config["n_positions"]
        if not 1 <= len(prompt) <= context:
            raise ValueError(f"the prompt has {len(prompt)} tokens; it must have 1 to {context}")
        past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), TYPES[i.type]) for i in self.caches}
        random, ids, seen = np.random.default_rng(seed), np.array([prompt], np.int64), 0
        for _ in range(min(count, context - len(prompt) + 1)):
            positions = np.arange(seen, seen + ids.shape[1])[None]
            seen += ids.shape[1]
            feed = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), "position_ids": positions}
            logits, *present = self.session.run(self.outputs, feed | past)
            past = dict(zip(past, present, strict=True))
            token = sample(logits[0, -1], temperature, top_k, random)
            if token == self.config["eos_token_id"]:
                return
            yield token
            ids = np.array([[token]], np.int64)

    def text(self, prompt: str, *options: Any) -> Iterator[str]:
        """Yield the generated text in pieces that end at a character boundary."""
        pending: list[int] = []
        for token in self.tokens(self.tokenizer.encode(prompt).ids, *options):
            pending.append(token)
            piece = self.tokenizer.decode(pending)
            if not piece.endswith("\ufffd"):  # otherwise the last character may be incomplete
                yield piece
                pending = []


def find(directory: Path, *names: str) -> Path:
    """Return the first of these files that exists in the directory."""
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory}: no {' or '.join(names)}; create the directory with gpt2x export --onnx")


def sample(logits: Any, temperature: float, top_k: int, random: np.random.Generator) -> int:
    """Sample a token id. Temperature 0 is greedy decoding; top_k 0 keeps all tokens."""
    if temperature == 0:
        return int(logits.argmax())
    best = np.argsort(-logits)[: top_k or None]
    weights = np.exp((logits[best] - logits[best[0]]).astype(np.float64) / temperature)
    return int(random.choice(best, p=weights / weights.sum()))


def parse(body: bytes) -> list[Any]:
    """Parse a request body. Return the prompt, max_new_tokens, temperature, top_k and seed."""
    request = json.loads(body)
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise ValueError('the request must be a JSON object with a string "prompt"')
    numbers = [request.get("max_new_tokens", 40), request.get("temperature", 1.0), request.get("top_k", 0)]
    if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
        raise ValueError("max_new_tokens, temperature and top_k must be numbers of at least 0")
    return [request["prompt"], *numbers, request.get("seed")]


class Handler(BaseHTTPRequestHandler):
    """Answer a POST request with JSON in its body by streaming text."""

    model: Model
    error_message_format, error_content_type = "%(explain)s\n", "text/plain; charset=utf-8"

    def do_POST(self) -> None:
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = self.model.text(*parse(body))
            first = next(pieces, "")  # an invalid request raises here, before the headers are sent
        except Exception as error:
            self.send_error(400, explain=str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        for piece in chain([first], pieces):
            self.wfile.write(piece.encode())
            self.wfile.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GPT-2 HTTP service")
    parser.add_argument("directory", type=Path, help="directory that gpt2x export --onnx wrote")
    parser.add_argument("positional_port", metavar="port", type=int, nargs="?", default=8000)
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", metavar="FILE", help="ONNX model to run, relative to the directory")
    parser.add_argument("--threads", type=int, default=0, help="default: one per core")
    arguments = parser.parse_args()
    port = arguments.positional_port if arguments.port is None else arguments.port
    try:
        Handler.model = Model(arguments.directory, arguments.model, arguments.threads)
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except Exception as error:
        sys.exit(f"service.py: {str(error).splitlines()[0]}")
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
