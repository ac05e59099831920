"""Plain onnxruntime, with a batch padded on the left, and arrays of the cache that are given and taken."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
task = json.loads(Path(sys.argv[1]).read_text())


def generate(session, tokenizer, texts):
    rows = [tokenizer.encode(text).ids for text in texts]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    caches = session.get_inputs()[3:]
    past = {i.name: np.zeros((len(rows), i.shape[1], 0, i.shape[3]), TYPES[i.type]) for i in caches}
    made = []
    for _ in range(task["count"]):
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *present = session.run(None, feed | past)
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1:].argmax(-1)
        made.append(ids)
        mask = np.concatenate((mask, np.ones_like(ids)), 1)
        positions = mask.sum(1, keepdims=True) - 1
    return np.concatenate(made, 1).tolist()


def results(directory, file):
    session = ort.InferenceSession(f"{directory}/{file}")
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    return [generate(session, tokenizer, texts) for texts in task["batches"]]


print(json.dumps([results(model["directory"], model["file"]) for model in task["models"]]))
