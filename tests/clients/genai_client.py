"""onnxruntime-genai. Batches are padded on the right, so their masks have holes."""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

directory, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
model = og.Model(directory)
tokenizer = og.Tokenizer(model)


def generate(texts):
    encoded = tokenizer.encode_batch(texts)
    longest = max(len(tokenizer.encode(text)) for text in texts)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + task["count"], do_sample=False, batch_size=len(texts))
    generator = og.Generator(model, params)
    generator.append_tokens(encoded)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(i) for i in generator.get_sequence(row)[longest:]] for row in range(len(texts))]


print(json.dumps({"single": generate(task["prompts"][:1])[0], "batch": generate(task["prompts"])}))
