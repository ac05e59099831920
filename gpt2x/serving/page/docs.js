"use strict";

function kindOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kindOf).join(" | ");
  if (schema.type === "array") return `list of ${kindOf(schema.items)}`;
  return schema.const ?? schema.type ?? "any";
}

function row(cells, kind) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const made = document.createElement(kind);
    made.textContent = cell;
    line.append(made);
  }
  return line;
}

function table(schema) {
  const made = document.createElement("table");
  made.append(row(["field", "type", ""], "th"));
  const required = schema.required ?? [];
  for (const [name, field] of Object.entries(schema.properties)) {
    const needed = required.includes(name) ? "required. " : "";
    made.append(row([name, kindOf(field), needed + (field.description ?? "")], "td"));
  }
  return made;
}

async function show() {
  const api = await (await fetch("openapi.json")).json();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const title = document.createElement("h2");
      title.textContent = `${method.toUpperCase()} ${path}`;
      const summary = document.createElement("p");
      summary.textContent = operation.summary;
      document.getElementById("paths").append(title, summary);
      const body = operation.requestBody?.content["application/json"].schema;
      if (body) document.getElementById("paths").append(table(api.components.schemas[kindOf(body)]));
    }
  }
}

show();
