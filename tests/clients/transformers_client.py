"""transformers' ``generate`` over its own model or optimum's. Arguments before the others': a module, and its class."""

import importlib
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

module, name, directory, file = sys.argv[1:5]
task = json.loads(Path(file).read_text())
model = getattr(importlib.import_module(module), name).from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token


def generate(texts):
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    result = model.generate(**inputs, max_new_tokens=task["count"], do_sample=False)
    return result[:, inputs["input_ids"].shape[1] :].tolist()


print(json.dumps({"single": generate(task["prompts"][:1])[0], "batch": generate(task["prompts"])}))
