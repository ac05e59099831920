// transformers.js's pipelines under Node, for tasks other than text generation. Arguments: the task's file, where the packages
// are installed, and a folder for the cache.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const [taskFile, packages, cache] = process.argv.slice(2);
const transformers = createRequire(join(packages, "package.json"))("@huggingface/transformers");
const { AutoModel, AutoTokenizer, TextClassificationPipeline, TokenClassificationPipeline, env, pipeline } = transformers;
const task = JSON.parse(readFileSync(taskFile, "utf8"));
const CLASSES = { "text-classification": TextClassificationPipeline, "token-classification": TokenClassificationPipeline };
env.cacheDir = cache;
if (task.hub) env.remoteHost = task.hub;
else env.allowRemoteModels = false;

// A pipeline as the model card says. Its tokenizer pads on the given side.
async function load(name, directory, dtype, side) {
  const run = CLASSES[name]
    ? new CLASSES[name]({
        task: name,
        model: await AutoModel.from_pretrained(directory, { dtype }),
        tokenizer: await AutoTokenizer.from_pretrained(directory),
      })
    : await pipeline(name, directory, { dtype });
  run.tokenizer.padding_side = side;
  run.tokenizer.pad_token_id = run.model.config.pad_token_id;
  return run;
}

// What a pipeline returns for all texts in one batch.
async function results({ directory, task: name, dtype, side }) {
  if (!task.hub) {
    env.localModelPath = dirname(directory);
    directory = basename(directory);
  }
  const run = await load(name, directory, dtype, side);
  if (name === "feature-extraction") return (await run(task.texts)).tolist();
  if (name === "text-classification") {
    const rows = await run(task.texts, { top_k: null });
    return rows.map((row) => Object.fromEntries(row.map(({ label, score }) => [label, score])));
  }
  const rows = await run(task.texts, { ignore_labels: [] });
  return rows.map((row) => row.map(({ entity, score }) => [entity, score]));
}

const found = [];
for (const model of task.models) found.push(await results(model));
console.log(JSON.stringify(found));
