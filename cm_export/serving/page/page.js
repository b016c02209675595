// The page of `cm-export serve`: picture and question in, the answer while it is written, kept patches over the picture.
"use strict";
const at = (id) => document.getElementById(id);
const SHADE = "rgba(20, 22, 28, 0.66)";
let picture = null; // {uri, width, height}
let grid = null; // of the last answer about it: {rows, columns, cells}
let running = null; // an AbortController

function headers() {
  return at("key").value ? { authorization: `Bearer ${at("key").value}` } : {};
}

async function refusal(response) {
  if (response.status === 401) {
    at("locked").hidden = false;
    at("key").focus();
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function complain(text) {
  at("wrong").hidden = !text;
  at("wrong").textContent = text || "";
}

async function introduce() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return complain(await refusal(response));
  const { id, cm_export: can } = (await response.json()).data[0];
  at("model").textContent = id;
  document.title = `${id} · cm-export`;
  const prunes = [can.tokens !== "dense" && "image tokens", can.neurons !== "dense" && "neurons"].filter(Boolean);
  at("does").textContent = prunes.length ? `It computes with chosen ${prunes.join(" and ")} only.` : "It computes with everything.";
  at("seen").hidden = !can.pictures;
  fill("token_share", can.tokens !== "dense");
  fill("neuron_share", can.neurons !== "dense");
}

function fill(id, can) {
  const select = at(id);
  select.disabled = !can;
  const shares = can ? [["", "as built"], ...[10, 25, 33, 50, 75].map((n) => [n / 100, `${n} %`])] : [["", "all"]];
  select.replaceChildren(...shares.map(([value, text]) => new Option(text, value)));
}

function show(file) {
  if (!file || !file.type.startsWith("image/")) return;
  const reader = new FileReader();
  reader.onload = () => {
    const image = at("picture");
    image.onload = () => {
      picture = { uri: reader.result, width: image.naturalWidth, height: image.naturalHeight };
      at("drop").classList.add("has");
      document.querySelector(".hint").hidden = true;
      document.querySelector(".frame").hidden = false;
      draw(null);
      complain("");
    };
    image.onerror = () => complain("This picture cannot be shown.");
    image.src = reader.result;
  };
  reader.readAsDataURL(file);
}

// Dropped patches are shaded, kept ones outlined; as `cm-export run --overlay` draws them.
function draw(kept) {
  grid = kept;
  const canvas = at("kept");
  const box = at("picture").getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(box.width * scale);
  canvas.height = Math.round(box.height * scale);
  at("legend").hidden = !kept;
  if (!kept) return;
  const { rows, columns, cells } = kept;
  const count = cells.split("1").length - 1;
  at("counted").textContent = `${count} of ${cells.length} patches kept`;
  if (!at("draw").checked) return;
  const pen = canvas.getContext("2d");
  const x = (column) => Math.round((column * canvas.width) / columns);
  const y = (row) => Math.round((row * canvas.height) / rows);
  const stays = (row, column) => row >= 0 && column >= 0 && row < rows && column < columns && cells[row * columns + column] === "1";
  const width = Math.max(1, Math.round(2 * scale));
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const [left, top, right, bottom] = [x(column), y(row), x(column + 1), y(row + 1)];
      if (!stays(row, column)) {
        pen.fillStyle = SHADE;
        pen.fillRect(left, top, right - left, bottom - top);
        continue;
      }
      if (count === cells.length) continue;
      pen.fillStyle = "#ffc400";
      if (!stays(row - 1, column)) pen.fillRect(left, top, right - left, width);
      if (!stays(row + 1, column)) pen.fillRect(left, bottom - width, right - left, width);
      if (!stays(row, column - 1)) pen.fillRect(left, top, width, bottom - top);
      if (!stays(row, column + 1)) pen.fillRect(right - width, top, width, bottom - top);
    }
  }
}

function body(dense) {
  const content = [{ type: "text", text: at("question").value }];
  if (picture) content.unshift({ type: "image_url", image_url: { url: picture.uri } });
  const asked = { messages: [{ role: "user", content }], stream: true, kept: true };
  if (dense) return { ...asked, dense: true };
  for (const id of ["token_share", "neuron_share"]) if (at(id).value) asked[id] = Number(at(id).value);
  return asked;
}

// Events of a stream: text pieces go to `say`; returns the figures of the answer.
async function stream(dense, say, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body(dense)), signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", figures = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      if (event.choices[0]?.delta.content) say(event.choices[0].delta.content);
      figures = event.cm_export || figures;
    }
  }
  if (!figures) throw new Error("The server ended before the answer was complete.");
  return figures;
}

const number = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function figuresOf(f) {
  const ms = (1000 * (f.queue_s + f.ttft_s));
  const rows = [["First token", ms < 1000 ? `${number(ms, 0)} ms` : `${number(ms / 1000, 2)} s`]];
  rows.push(["Then", f.tokens_per_s ? `${number(f.tokens_per_s, f.tokens_per_s < 20 ? 1 : 0)} tokens/s` : "one token"]);
  if (f.image_tokens) rows.push(["Image tokens", String(f.image_tokens_kept), `of ${f.image_tokens}`]);
  rows.push(["Neurons a layer", String(f.neurons_kept), `of ${f.neurons}`]);
  return rows.map(([name, value, more]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = name;
    dd.textContent = value;
    if (more) dd.append(" ", Object.assign(document.createElement("small"), { textContent: more }));
    const pair = document.createElement("div");
    pair.append(dt, dd);
    return pair;
  });
}

async function one(id, dense, signal) {
  const card = at(id), text = card.querySelector(".text");
  card.hidden = false;
  card.classList.add("writing");
  text.classList.remove("empty");
  text.textContent = "";
  try {
    const figures = await stream(dense, (piece) => (text.textContent += piece), signal);
    card.querySelector("dl").replaceChildren(...figuresOf(figures));
    if (!dense && figures.kept.length) draw(figures.kept[0]);
    return { text: text.textContent, ...figures };
  } finally {
    card.classList.remove("writing");
  }
}

function compare(sparse, dense) {
  const share = (a, b) => `${number((100 * a) / b, 0)} %`;
  const first = share(sparse.queue_s + sparse.ttft_s, dense.queue_s + dense.ttft_s);
  let text = sparse.text === dense.text ? "The dense model says the same." : "The dense model says something else.";
  text += ` Pruned, the first token took ${first} of the dense model's time`;
  if (dense.tokens_per_s && sparse.tokens_per_s) text += `; then text came at ${share(sparse.tokens_per_s, dense.tokens_per_s)} of its speed`;
  at("verdict").textContent = `${text}.`;
  at("verdict").hidden = false;
}

async function ask(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  complain("");
  at("send").disabled = true;
  at("stop").hidden = false;
  at("verdict").hidden = true;
  at("dense").hidden = true;
  if (matchMedia("(max-width: 760px)").matches) at("answers").scrollIntoView({ behavior: "smooth" });
  for (const id of ["sparse", "dense"]) at(id).querySelector("dl").replaceChildren();
  try {
    const sparse = await one("sparse", false, running.signal);
    if (at("beside").checked) compare(sparse, await one("dense", true, running.signal));
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    running = null;
    at("send").disabled = false;
    at("stop").hidden = true;
  }
}

at("ask").addEventListener("submit", ask);
at("stop").addEventListener("click", () => running && running.abort());
at("file").addEventListener("change", (event) => show(event.target.files[0]));
at("draw").addEventListener("change", () => draw(grid));
at("key").addEventListener("change", introduce);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) addEventListener(name, () => at("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  show(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => show([...event.clipboardData.files][0]));
addEventListener("resize", () => draw(grid));
at("sparse").querySelector(".text").classList.add("empty");
introduce();
