"""transformers' ``generate`` over its own model or optimum's. Arguments before the task: a module, and its class."""

import importlib
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

module, name, task_file = sys.argv[1:4]
task, kind = json.loads(Path(task_file).read_text()), getattr(importlib.import_module(module), name)


def generate(model, tokenizer, texts):
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    result = model.generate(**inputs, max_new_tokens=task["count"], do_sample=False, **task.get("search", {}))
    return result[:, inputs["input_ids"].shape[1] :].tolist()


def results(directory, file):
    name = Path(file).name
    model = kind.from_pretrained(directory, **({} if name == "model.onnx" else {"file_name": name}))
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return [generate(model, tokenizer, texts) for texts in task["batches"]]


print(json.dumps([results(model["directory"], model["file"]) for model in task["models"]]))
