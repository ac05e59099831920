// @huggingface/transformers under Node. Arguments: the task, and where the packages are installed.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const [taskFile, packages] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoTokenizer, env } = createRequire(join(packages, "package.json"))("@huggingface/transformers");
const task = JSON.parse(readFileSync(taskFile, "utf8"));
env.allowRemoteModels = false;

async function generate(model, tokenizer, texts) {
  const inputs = tokenizer(texts, { padding: true });
  const result = await model.generate({ ...inputs, max_new_tokens: task.count, do_sample: false });
  return result.tolist().map((row) => row.slice(inputs.input_ids.dims[1]).map(Number));
}

const results = [];
for (const { directory, dtype } of task.models) {
  env.localModelPath = dirname(directory);
  const tokenizer = await AutoTokenizer.from_pretrained(basename(directory));
  const model = await AutoModelForCausalLM.from_pretrained(basename(directory), { dtype });
  tokenizer.padding_side = "left";
  tokenizer.pad_token_id = model.config.eos_token_id;
  const rows = [];
  for (const texts of task.batches) rows.push(await generate(model, tokenizer, texts));
  results.push(rows);
}
console.log(JSON.stringify(results));
