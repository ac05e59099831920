"""optimum's ``ORTModelForCausalLM``."""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

directory, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
model = ORTModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token


def generate(texts):
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    result = model.generate(**inputs, max_new_tokens=task["count"], do_sample=False)
    return result[:, inputs["input_ids"].shape[1] :].tolist()


print(json.dumps({"single": generate(task["prompts"][:1])[0], "batch": generate(task["prompts"])}))
