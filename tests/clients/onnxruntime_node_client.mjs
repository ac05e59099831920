// Plain onnxruntime-node, with a batch padded on the left. Arguments as of the other programs for Node.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [directory, file, packages] = process.argv.slice(2);
const require = createRequire(join(packages, "package.json"));
const { InferenceSession, Tensor } = require("onnxruntime-node");
const { Tokenizer } = require("@huggingface/tokenizers");
const json = (path) => JSON.parse(readFileSync(path, "utf8"));
const task = json(file);
const config = json(join(directory, "config.json"));
const tokenizer = new Tokenizer(json(join(directory, "tokenizer.json")), json(join(directory, "tokenizer_config.json")));
const session = await InferenceSession.create(join(directory, "onnx/model.onnx"));
const caches = session.inputNames.filter((name) => name.startsWith("past_key_values."));
const int64 = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);

async function generate(texts) {
  const rows = texts.map((text) => tokenizer.encode(text).ids);
  const width = Math.max(...rows.map((row) => row.length));
  let ids = rows.map((row) => [...Array(width - row.length).fill(0), ...row]);
  const mask = rows.map((row) => [...Array(width - row.length).fill(0), ...Array(row.length).fill(1)]);
  let positions = rows.map((row) => [...Array(width - row.length).fill(0), ...row.keys()]);
  const empty = [rows.length, config.n_head, 0, config.n_embd / config.n_head];
  let past = Object.fromEntries(caches.map((name) => [name, new Tensor("float32", new Float32Array(0), empty)]));
  const made = rows.map(() => []);
  for (let step = 0; step < task.count; step++) {
    const feed = { input_ids: int64(ids), attention_mask: int64(mask), position_ids: int64(positions), ...past };
    const output = await session.run(feed);
    past = Object.fromEntries(caches.map((name) => [name, output[name.replace("past_key_values", "present")]]));
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

console.log(JSON.stringify({ single: (await generate(task.prompts.slice(0, 1)))[0], batch: await generate(task.prompts) }));
