"""llama.cpp on a GGUF file: the ids of a prompt, and greedy ids after it. Run in the environment that has llama-cpp-python.

python llama_client.py model.gguf PROMPT COUNT      ->  {"prompt": [...], "greedy": [...], "text": "..."}
"""

import json
import sys

import llama_cpp
import numpy as np

path, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=0, n_threads=1, verbose=False)
ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
model.eval(ids)
greedy = []
for _ in range(count):
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
    greedy.append(int(logits.argmax()))
    model.eval(greedy[-1:])
print(json.dumps({"prompt": ids, "greedy": greedy, "text": model.detokenize(greedy).decode(errors="replace")}))
