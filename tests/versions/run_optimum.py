"""Run directories in the installed optimum: ``python run_optimum.py TASK``. Prints the results as JSON.

TASK is a JSON file with ``models`` (directories), ``files`` (the ONNX file of each), ``prompts`` (token ids) and ``count``.
A result is the new tokens for each prompt, or the error.
"""

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def generate(model, prompt, count):
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


def attempt(directory, file, prompts, count):
    options = {} if file == "model.onnx" else {"file_name": file}
    try:
        model = ORTModelForCausalLM.from_pretrained(directory, **options)
        return {"tokens": [generate(model, prompt, count) for prompt in prompts]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    pairs = zip(task["models"], task["files"], strict=True)
    print(json.dumps({path: attempt(path, file, task["prompts"], task["count"]) for path, file in pairs}))
