// Plain onnxruntime-node, with a batch padded on the left. Arguments as of the other program for Node.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [taskFile, packages] = process.argv.slice(2);
const require = createRequire(join(packages, "package.json"));
const { InferenceSession, Tensor } = require("onnxruntime-node");
const { Tokenizer } = require("@huggingface/tokenizers");
const json = (path) => JSON.parse(readFileSync(path, "utf8"));
const task = json(taskFile);
const ARRAYS = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };
const int64 = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);

async function generate(session, tokenizer, config, texts) {
  const rows = texts.map((text) => tokenizer.encode(text).ids);
  const width = Math.max(...rows.map((row) => row.length));
  let ids = rows.map((row) => [...Array(width - row.length).fill(0), ...row]);
  const mask = rows.map((row) => [...Array(width - row.length).fill(0), ...Array(row.length).fill(1)]);
  let positions = rows.map((row) => [...Array(width - row.length).fill(0), ...row.keys()]);
  const caches = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."));
  const shape = [rows.length, config.n_head, 0, config.n_embd / config.n_head];
  let past = Object.fromEntries(caches.map(({ name, type }) => [name, new Tensor(type, new ARRAYS[type](0), shape)]));
  const made = rows.map(() => []);
  for (let step = 0; step < task.count; step++) {
    const feed = { input_ids: int64(ids), attention_mask: int64(mask), position_ids: int64(positions), ...past };
    const output = await session.run(feed);
    past = Object.fromEntries(caches.map(({ name }) => [name, output[name.replace("past_key_values", "present")]]));
    const [, length, size] = output.logits.dims;
    ids = rows.map((_, row) => {
      const end = (row + 1) * length * size;
      const logits = output.logits.data.subarray(end - size, end);
      return [logits.reduce((best, x, i) => (x > logits[best] ? i : best), 0)];
    });
    rows.forEach((prompt, row) => {
      made[row].push(ids[row][0]);
      mask[row].push(1);
      positions[row] = [prompt.length + step];
    });
  }
  return made;
}

const results = [];
for (const { directory, file } of task.models) {
  const [config, vocabulary, settings] = ["config", "tokenizer", "tokenizer_config"].map((n) => json(join(directory, `${n}.json`)));
  const path = join(directory, file);
  const session = await InferenceSession.create(task.bytes ? new Uint8Array(readFileSync(path)) : path);
  const rows = [];
  for (const texts of task.batches) rows.push(await generate(session, new Tokenizer(vocabulary, settings), config, texts));
  results.push(rows);
}
console.log(JSON.stringify(results));
