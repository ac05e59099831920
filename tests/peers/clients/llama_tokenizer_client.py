"""llama.cpp's tokenizer of a GGUF file. Run in the environment that has llama-cpp-python.

python llama_tokenizer_client.py model.gguf TEXT ...   ->  [[ids, text, text without special tokens], ...]
"""

import json
import sys

import llama_cpp

model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
results = []
for text in sys.argv[2:]:
    ids = model.tokenize(text.encode(), add_bos=False, special=True)
    pieces = [b"".join(model.detokenize([i], special=special) for i in ids) for special in (True, False)]
    results.append([ids, *(piece.decode(errors="replace") for piece in pieces)])
print(json.dumps(results))
