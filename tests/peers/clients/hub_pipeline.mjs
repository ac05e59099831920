// transformers.js with models on a Hub, in Node and in a browser: a pipeline with no option but the dtype.

// Returns, for each model and dtype, the text that a pipeline makes of each prompt, and its new tokens.
export async function run({ pipeline, env, TextStreamer }, { hub, names, dtypes, prompts, count }) {
  env.remoteHost = hub;
  const results = {};
  for (const name of names) {
    results[name] = {};
    for (const dtype of dtypes) {
      const generator = await pipeline("text-generation", name, { dtype });
      results[name][dtype] = await continued(generator, TextStreamer, prompts, count);
    }
  }
  return results;
}

async function continued(generator, TextStreamer, prompts, count) {
  const result = { texts: [], tokens: [] };
  for (const prompt of prompts) {
    const tokens = [];
    const collect = (some) => tokens.push(...some.map(Number));
    const callbacks = { token_callback_function: collect, callback_function: () => {} };
    const streamer = new TextStreamer(generator.tokenizer, { skip_prompt: true, ...callbacks });
    const [{ generated_text }] = await generator(prompt, { max_new_tokens: count, do_sample: false, streamer });
    result.texts.push(generated_text);
    result.tokens.push(tokens);
  }
  return result;
}
