// Run directories in @huggingface/transformers: node run_transformersjs.mjs TASK PACKAGES. Prints the results as JSON.
// TASK is a JSON file with models (directories), dtypes (of each), prompts (texts) and count; PACKAGES is the folder where
// npm installed. A result is the new tokens for each prompt, or the error.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const [taskFile, packages] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoTokenizer, env } = createRequire(join(packages, "package.json"))("@huggingface/transformers");
const task = JSON.parse(readFileSync(taskFile, "utf8"));
env.allowRemoteModels = false;

async function generate(model, tokenizer, text) {
  const inputs = tokenizer(text);
  const result = await model.generate({ ...inputs, max_new_tokens: task.count, do_sample: false });
  return result.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
}

const results = {};
for (const [i, directory] of task.models.entries()) {
  env.localModelPath = dirname(directory);
  try {
    const tokenizer = await AutoTokenizer.from_pretrained(basename(directory));
    const model = await AutoModelForCausalLM.from_pretrained(basename(directory), { dtype: task.dtypes[i] });
    const tokens = [];
    for (const text of task.prompts) tokens.push(await generate(model, tokenizer, text));
    results[directory] = { tokens };
  } catch (error) {
    results[directory] = { error: String(error) };
  }
}
console.log(JSON.stringify(results));
