"""Run directories in the installed onnxruntime-genai: ``python run_genai.py TASK``. Prints the results as JSON.

TASK is a JSON file with ``models`` (directories), ``prompts`` (token ids) and ``count``. A result is the new tokens for each
prompt, or the error.
"""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og


def generate(model, prompt, count):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    if hasattr(og.Generator, "append_tokens"):
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
    else:  # before 0.6
        params.input_ids = prompt
        generator = og.Generator(model, params)
    while not generator.is_done():
        if hasattr(generator, "compute_logits"):
            generator.compute_logits()
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def attempt(directory, prompts, count):
    try:
        model = og.Model(directory)
        og.Tokenizer(model)
        return {"tokens": [generate(model, prompt, count) for prompt in prompts]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({path: attempt(path, task["prompts"], task["count"]) for path in task["models"]}))
