"""onnxruntime-genai, which runs the model that a directory's genai_config.json names. Batches are padded on the right:
the masks of a growing cache have holes, those of one that stays in place are each row's length."""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

task = json.loads(Path(sys.argv[1]).read_text())


def generate(model, in_place, texts, adapters):
    tokenizer = og.Tokenizer(model)
    encoded = tokenizer.encode_batch(texts)
    longest = max(len(tokenizer.encode(text)) for text in texts)
    params = og.GeneratorParams(model)
    whole = longest + task["count"]
    params.set_search_options(max_length=whole, do_sample=False, batch_size=len(texts), **task.get("search", {}))
    generator = og.Generator(model, params)
    if adapters is not None:
        generator.set_active_adapter(adapters, task["adapter"])
    generator.append_tokens(encoded)
    assert generator.get_output("present.0.key").shape[2] == (whole if in_place else longest), "the other kind of cache"
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(i) for i in generator.get_sequence(row)[longest:]] for row in range(len(texts))]


def results(directory):
    model, config = og.Model(directory), json.loads(Path(directory, "genai_config.json").read_text())
    in_place = config["search"]["past_present_share_buffer"]
    return [generate(model, in_place, texts, adapters_of(model, directory)) for texts in task["batches"]]


def adapters_of(model, directory):
    """The adapter that the task names; None if it names none."""
    if not task.get("adapter"):
        return None
    adapters = og.Adapters(model)
    adapters.load(f"{directory}/onnx/{task['adapter']}.onnx_adapter", task["adapter"])
    return adapters


print(json.dumps([results(model["directory"]) for model in task["models"]]))
