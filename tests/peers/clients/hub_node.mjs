// Runs hub_pipeline.mjs under Node. Arguments: the task as JSON, where the packages are installed, and a folder for the cache.
import { createRequire } from "node:module";
import { join } from "node:path";
import { run } from "./hub_pipeline.mjs";

const [task, packages, cache] = process.argv.slice(2);
const transformers = createRequire(join(packages, "package.json"))("@huggingface/transformers");
transformers.env.cacheDir = cache;
console.log(JSON.stringify(await run(transformers, JSON.parse(task))));
