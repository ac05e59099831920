"use strict";

const element = (id) => document.getElementById(id);
let controller = null;

function headers() {
  const found = { "Content-Type": "application/json" };
  const key = element("key").value;
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  const texts = answer.data.filter((model) => model.task === "text-generation");
  const models = texts.map((model) => new Option(model.id, model.id));
  element("model").replaceChildren(...models);
}

function request() {
  const body = {
    model: element("model").value || null,
    prompt: element("prompt").value,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: 5,
  };
  for (const name of ["max_tokens", "temperature", "top_p", "top_k", "seed"]) {
    const value = element(name).value;
    if (value !== "") body[name] = Number(value);
  }
  if (element("stop").value) body.stop = element("stop").value;
  return body;
}

// The data of each server-sent event. A character may be split between two chunks, so the decoder keeps its start.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;

function describe(scores, i) {
  const rows = Object.entries(scores.top_logprobs[i]).sort((a, b) => b[1] - a[1]);
  const chosen = scores.tokens[i];
  const lines = rows.map(([token, logprob]) => {
    const mark = token === chosen ? "→" : " ";
    return `${mark} ${percent(logprob).padStart(6)}  ${JSON.stringify(token)}`;
  });
  return lines.join("\n");
}

function kind(logprob) {
  const probability = Math.exp(logprob);
  if (probability > 0.3) return "likely";
  return probability > 0.03 ? "unlikely" : "rare";
}

// A piece has one text and the tokens that begin in it: each token gets the text up to the next one.
function append(choice, length) {
  const scores = choice.logprobs;
  if (!scores) {
    element("text").append(choice.text);
    return;
  }
  scores.tokens.forEach((_, i) => {
    const start = i === 0 ? 0 : Math.max(0, scores.text_offset[i] - length);
    const end = i + 1 < scores.tokens.length ? Math.max(0, scores.text_offset[i + 1] - length) : Infinity;
    const span = document.createElement("span");
    // text_offset counts characters, and a string of JavaScript counts UTF-16 units.
    span.textContent = [...choice.text].slice(start, end).join("");
    span.className = `token ${kind(scores.token_logprobs[i])}`;
    span.dataset.details = describe(scores, i);
    element("text").append(span);
  });
}

async function generate() {
  const body = request();
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = body.prompt;
  element("text").replaceChildren(prompt);
  show("waiting");
  controller = new AbortController();
  const response = await fetch("v1/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify(body),
    signal: controller.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let first = null;
  let tokens = 0;
  let length = 0;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const answer = JSON.parse(data);
    if (answer.error) throw new Error(answer.error.message);
    if (answer.usage) tokens = answer.usage.completion_tokens;
    for (const choice of answer.choices) {
      append(choice, length);
      length += [...choice.text].length;
      tokens += choice.logprobs ? choice.logprobs.tokens.length : 0;
    }
    first ??= performance.now();
    const seconds = (performance.now() - first) / 1000;
    // The first token took the time of the prompt.
    const speed = seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    show(`${tokens} tokens  ${speed}`);
  }
}

function show(text, error = false) {
  element("status").textContent = text;
  element("status").className = error ? "error" : "";
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  element("start").disabled = true;
  element("cancel").disabled = false;
  try {
    if (!element("model").value) await loadModels();
    await generate();
  } catch (error) {
    if (error.name !== "AbortError") show(error.message, true);
  }
  element("start").disabled = false;
  element("cancel").disabled = true;
});

element("cancel").addEventListener("click", () => controller?.abort());

element("text").addEventListener("mouseover", (event) => {
  const details = event.target.dataset?.details;
  element("details").hidden = !details;
  if (!details) return;
  element("details").textContent = details;
  const place = event.target.getBoundingClientRect();
  element("details").style.left = `${Math.min(place.left, innerWidth - 260)}px`;
  element("details").style.top = `${place.bottom + 6}px`;
});
element("text").addEventListener("mouseleave", () => { element("details").hidden = true; });
element("key").addEventListener("change", () => loadModels().catch((error) => show(error.message, true)));

loadModels().catch((error) => show(error.message, true));
