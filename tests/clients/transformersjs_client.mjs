// @huggingface/transformers under Node. Arguments: the directory, the task, and where the packages are installed.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const [directory, file, packages] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoTokenizer, env } = createRequire(join(packages, "package.json"))("@huggingface/transformers");
const task = JSON.parse(readFileSync(file, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(directory);
const tokenizer = await AutoTokenizer.from_pretrained(basename(directory));
const model = await AutoModelForCausalLM.from_pretrained(basename(directory), { dtype: "fp32" });
tokenizer.padding_side = "left";
tokenizer.pad_token_id = model.config.eos_token_id;

async function generate(texts) {
  const inputs = tokenizer(texts, { padding: true });
  const result = await model.generate({ ...inputs, max_new_tokens: task.count, do_sample: false });
  return result.tolist().map((row) => row.slice(inputs.input_ids.dims[1]).map(Number));
}

console.log(JSON.stringify({ single: (await generate(task.prompts.slice(0, 1)))[0], batch: await generate(task.prompts) }));
