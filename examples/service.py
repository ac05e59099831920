"""A GPT-2 service in Python without PyTorch: onnxruntime, numpy and tokenizers, and nothing of gpt2x.

    gpt2x export models/124M --onnx gpt2-onnx/
    python examples/service.py gpt2-onnx/ 8000
    curl -N localhost:8000 -d '{"prompt": "ROMEO:", "max_new_tokens": 40, "temperature": 0.8, "top_k": 40, "seed": 1}'

The text comes as it is made.
"""

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


class Model:
    """The ONNX model and its tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.session = ort.InferenceSession(str(directory / "onnx/model.onnx"))
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.config = json.loads((directory / "config.json").read_text())

    def tokens(self, prompt: list[int], count: int, temperature: float, top_k: int, seed: Any) -> Iterator[int]:
        """Prefill, then one token a run on the cache."""
        if not 1 <= len(prompt) <= self.config["n_positions"] or temperature < 0 or top_k < 0:
            raise ValueError(f"a prompt of 1 to {self.config['n_positions']} tokens is needed, nothing below 0")
        heads, width = self.config["n_head"], self.config["n_embd"]
        names = [i.name for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        past = {name: np.zeros((1, heads, 0, width // heads), np.float32) for name in names}
        random, ids, seen = np.random.default_rng(seed), np.array([prompt], np.int64), 0
        for _ in range(min(count, self.config["n_positions"] - len(prompt) + 1)):
            positions = np.arange(seen, seen + ids.shape[1])[None]
            seen += ids.shape[1]
            feed = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), "position_ids": positions}
            logits, *present = self.session.run(None, feed | past)
            past = dict(zip(names, present, strict=True))
            token = sample(logits[0, -1], temperature, top_k, random)
            if token == self.config["eos_token_id"]:
                return
            yield token
            ids = np.array([[token]], np.int64)

    def text(self, prompt: str, count: int, temperature: float, top_k: int, seed: Any) -> Iterator[str]:
        """The continuation in pieces of whole characters."""
        pending: list[int] = []
        for token in self.tokens(self.tokenizer.encode(prompt).ids, count, temperature, top_k, seed):
            pending.append(token)
            piece = self.tokenizer.decode(pending)
            if not piece.endswith("\ufffd"):  # perhaps the beginning of a character
                yield piece
                pending = []


def sample(logits: Any, temperature: float, top_k: int, random: np.random.Generator) -> int:
    """One token; temperature 0 is greedy."""
    if temperature == 0:
        return int(logits.argmax())
    best = np.argsort(-logits)[: top_k or None]
    weights = np.exp((logits[best] - logits[best[0]]).astype(np.float64) / temperature)
    return int(random.choice(best, p=weights / weights.sum()))


class Handler(BaseHTTPRequestHandler):
    """POST JSON, get text."""

    model: Model

    def do_POST(self) -> None:
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            options = [
                asked.get(*o) for o in (("max_new_tokens", 40), ("temperature", 1.0), ("top_k", 0), ("seed", None))
            ]
            pieces = self.model.text(asked["prompt"], *options)
            first = next(pieces, "")  # whatever is wrong comes out here
        except Exception as error:
            return self.send_error(400, str(error).splitlines()[0])
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        for piece in chain([first], pieces):
            self.wfile.write(piece.encode())
            self.wfile.flush()
        return None


if __name__ == "__main__":
    Handler.model = Model(Path(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8000), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
