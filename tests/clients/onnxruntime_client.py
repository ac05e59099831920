"""Plain onnxruntime, with a batch padded on the left."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

directory, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
session = ort.InferenceSession(f"{directory}/onnx/model.onnx")
tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")


def generate(texts):
    rows = [tokenizer.encode(text).ids for text in texts]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    caches = session.get_inputs()[3:]
    past = {i.name: np.zeros((len(rows), i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
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


print(json.dumps({"single": generate(task["prompts"][:1])[0], "batch": generate(task["prompts"])}))
