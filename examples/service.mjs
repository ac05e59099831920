// A GPT-2 service in Node: onnxruntime-node runs the model, @huggingface/tokenizers reads and writes the text.
//
//   gpt2x export models/124M --onnx gpt2-onnx/
//   npm install onnxruntime-node @huggingface/tokenizers
//   node service.mjs gpt2-onnx/ 8000
//   curl -N localhost:8000 -d '{"prompt": "ROMEO:", "max_new_tokens": 40, "temperature": 0.8, "top_k": 40}'
//
// The text comes as it is made.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { InferenceSession, Tensor } from "onnxruntime-node";

const [directory, port = "8000"] = process.argv.slice(2);
const json = (name) => JSON.parse(readFileSync(join(directory, name), "utf8"));
const config = json("config.json");
const tokenizer = new Tokenizer(json("tokenizer.json"), json("tokenizer_config.json"));
const session = await InferenceSession.create(join(directory, "onnx/model.onnx"));
const caches = session.inputNames.filter((name) => name.startsWith("past_key_values."));

const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const range = (start, end) => Array.from({ length: end - start }, (_, i) => start + i);

// Prefill, then one token a run on the cache.
async function* tokens(prompt, { max_new_tokens = 40, temperature = 1, top_k = 0 }) {
  if (!(prompt.length >= 1 && prompt.length <= config.n_positions && temperature >= 0 && top_k >= 0))
    throw new Error(`a prompt of 1 to ${config.n_positions} tokens is needed, and nothing below 0`);
  const empty = [1, config.n_head, 0, config.n_embd / config.n_head];
  let past = Object.fromEntries(caches.map((name) => [name, new Tensor("float32", new Float32Array(0), empty)]));
  const count = Math.min(max_new_tokens, config.n_positions - prompt.length + 1);
  for (let ids = prompt, seen = 0, made = 0; made < count; made++) {
    const positions = range(seen, (seen += ids.length));
    const output = await session.run({
      input_ids: int64(ids),
      attention_mask: int64(Array(seen).fill(1)),
      position_ids: int64(positions),
      ...past,
    });
    past = Object.fromEntries(caches.map((name) => [name, output[name.replace("past_key_values", "present")]]));
    const token = sample(output.logits.data.subarray(-config.vocab_size), temperature, top_k);
    if (token === config.eos_token_id) return;
    yield token;
    ids = [token];
  }
}

// One token; temperature 0 is greedy.
function sample(logits, temperature, top_k) {
  if (temperature === 0) return logits.reduce((best, x, i) => (x > logits[best] ? i : best), 0);
  const best = range(0, logits.length).sort((a, b) => logits[b] - logits[a]).slice(0, top_k || undefined);
  const weights = best.map((i) => Math.exp((logits[i] - logits[best[0]]) / temperature));
  let left = Math.random() * weights.reduce((a, b) => a + b);
  return best[weights.findIndex((w) => (left -= w) < 0)] ?? best[0];
}

// The continuation in pieces of whole characters.
async function* text(prompt, options) {
  let pending = [];
  for await (const token of tokens(tokenizer.encode(prompt).ids, options)) {
    pending.push(token);
    const piece = tokenizer.decode(pending, { clean_up_tokenization_spaces: false });
    if (piece.endsWith("\ufffd")) continue; // perhaps the beginning of a character
    yield piece;
    pending = [];
  }
}

const server = createServer(async (request, response) => {
  try {
    let body = "";
    for await (const chunk of request) body += chunk;
    const { prompt, ...options } = JSON.parse(body);
    for await (const piece of text(prompt, options)) response.write(piece);
  } catch (error) {
    if (!response.headersSent) response.statusCode = 400;
    response.write(`${error.message}\n`);
  }
  response.end();
});
server.listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
