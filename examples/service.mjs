// A GPT-2 HTTP service in Node. onnxruntime-node runs the model, @huggingface/tokenizers encodes and decodes the text.
//
//   gpt2x export models/124M --onnx gpt2-onnx/
//   npm install onnxruntime-node @huggingface/tokenizers
//   node service.mjs gpt2-onnx/ --port 8000 --threads 2
//   curl -N localhost:8000 -d '{"prompt": "ROMEO:", "max_new_tokens": 40, "temperature": 0.8, "top_k": 40}'
//
// All precisions and kinds of cache work. `--model onnx/model_q4.onnx` selects one of several models.
// The response is streamed while the text is generated.
import { existsSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import { InferenceSession, Tensor } from "onnxruntime-node";

const MODELS = ["model.onnx", "model_quantized.onnx", "model_int8.onnx", "model_q4.onnx", "model_fp16.onnx"];
const ARRAYS = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };
// onnxruntime-node 1.30 fails with Node 24's Float16Array (microsoft/onnxruntime#32323). Without Float16Array it uses Uint16Array.
delete globalThis.Float16Array;

const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const range = (start, end) => Array.from({ length: end - start }, (_, i) => start + i);

// Return the first of these files that exists in the directory.
function find(directory, names) {
  const found = names.map((name) => resolve(directory, name)).find(existsSync);
  if (found) return found;
  throw new Error(`${directory}: no ${names.join(" or ")}; create the directory with gpt2x export --onnx`);
}

async function load(directory, model, threads) {
  const json = (name) => JSON.parse(readFileSync(find(directory, [name]), "utf8"));
  const file = find(directory, model ? [model] : MODELS.map((name) => `onnx/${name}`));
  const tokenizer = new Tokenizer(json("tokenizer.json"), json("tokenizer_config.json"));
  const options = { intraOpNumThreads: threads };
  const session = await InferenceSession.create(file, options);
  const caches = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."));
  return { tokenizer, session, caches, config: json("config.json") };
}

// Yield token ids: prefill the prompt, then decode one token per run with the KV cache.
async function* tokens({ session, caches, config }, prompt, { max_new_tokens = 40, temperature = 1, top_k = 0 }) {
  if (!(prompt.length >= 1 && prompt.length <= config.n_positions))
    throw new Error(`the prompt has ${prompt.length} tokens; it must have 1 to ${config.n_positions}`);
  if (![max_new_tokens, temperature, top_k].every((value) => typeof value === "number" && value >= 0))
    throw new Error("max_new_tokens, temperature and top_k must be numbers of at least 0");
  const empty = ({ type, shape: [, heads, , width] }) => new Tensor(type, new ARRAYS[type](0), [1, heads, 0, width]);
  let past = Object.fromEntries(caches.map((input) => [input.name, empty(input)]));
  const count = Math.min(max_new_tokens, config.n_positions - prompt.length + 1);
  for (let ids = prompt, seen = 0, made = 0; made < count; made++) {
    const positions = range(seen, (seen += ids.length));
    const output = await session.run({
      input_ids: int64(ids),
      attention_mask: int64(Array(seen).fill(1)),
      position_ids: int64(positions),
      ...past,
    });
    past = Object.fromEntries(caches.map(({ name }) => [name, output[name.replace("past_key_values", "present")]]));
    const token = sample(output.logits.data.subarray(-output.logits.dims[2]), temperature, top_k);
    if (token === config.eos_token_id) return;
    yield token;
    ids = [token];
  }
}

// Sample a token id. Temperature 0 is greedy decoding; top_k 0 keeps all tokens.
function sample(logits, temperature, top_k) {
  if (temperature === 0) return logits.reduce((best, x, i) => (x > logits[best] ? i : best), 0);
  const best = range(0, logits.length).sort((a, b) => logits[b] - logits[a]).slice(0, top_k || undefined);
  const weights = best.map((i) => Math.exp((logits[i] - logits[best[0]]) / temperature));
  let left = Math.random() * weights.reduce((a, b) => a + b);
  return best[weights.findIndex((w) => (left -= w) < 0)] ?? best[0];
}

// Yield the generated text in pieces that end at a character boundary.
async function* text(model, prompt, options) {
  if (typeof prompt !== "string") throw new Error('the request must be a JSON object with a string "prompt"');
  let pending = [];
  for await (const token of tokens(model, model.tokenizer.encode(prompt).ids, options)) {
    pending.push(token);
    const piece = model.tokenizer.decode(pending, { clean_up_tokenization_spaces: false });
    if (piece.endsWith("\ufffd")) continue; // the last character may be incomplete
    yield piece;
    pending = [];
  }
}

async function answer(model, request, response) {
  try {
    let body = "";
    for await (const chunk of request) body += chunk;
    const options = JSON.parse(body);
    response.setHeader("Content-Type", "text/plain; charset=utf-8");
    for await (const piece of text(model, options?.prompt, options)) response.write(piece);
    response.end();
  } catch (error) {
    if (!response.headersSent) return response.writeHead(400).end(`${error.message}\n`);
    console.error(error); // the response has started: close the connection
    response.destroy();
  }
}

function fail(error) {
  console.error(`service.mjs: ${error.message.split("\n")[0]}`);
  process.exit(1);
}

async function main() {
  const options = { port: { type: "string" }, model: { type: "string" }, threads: { type: "string" } };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const [directory = ".", port = values.port ?? "8000"] = positionals;
  const model = await load(directory, values.model, Number(values.threads ?? 0));
  const server = createServer((request, response) => answer(model, request, response));
  server.on("error", fail);
  server.listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
}

main().catch(fail);
