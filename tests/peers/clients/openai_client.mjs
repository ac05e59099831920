// Talks to a server with OpenAI's package for JavaScript: node openai_client.mjs PACKAGES URL
import { createRequire } from "node:module";
import { join } from "node:path";

const [packages, baseURL] = process.argv.slice(2);
const { default: OpenAI, NotFoundError, BadRequestError } = createRequire(join(packages, "package.json"))("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const settings = { model: "gpt2", prompt: "ROMEO:", max_tokens: 30, seed: 1 };

const whole = await client.completions.create({ ...settings, logprobs: 2 });
const stream = await client.completions.create({ ...settings, stream: true, stream_options: { include_usage: true } });
let streamed = "";
let usage = null;
for await (const piece of stream) {
  streamed += piece.choices[0]?.text ?? "";
  usage = piece.usage ?? usage;
}

const errors = [];
for (const wrong of [{ model: "other" }, { max_tokens: 100000 }]) {
  try {
    await client.completions.create({ ...settings, ...wrong });
  } catch (error) {
    errors.push({ code: error.code, known: error instanceof NotFoundError || error instanceof BadRequestError });
  }
}

// A stream that the client gives up.
const controller = new AbortController();
const long = await client.completions.create({ ...settings, max_tokens: 200, n: 16, stream: true }, { signal: controller.signal });
for await (const _ of long) {
  controller.abort();
  break;
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({ whole: whole.choices[0].text, tokens: whole.choices[0].logprobs.tokens, streamed, usage, errors, models }));
