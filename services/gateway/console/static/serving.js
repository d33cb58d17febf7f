// The serving page: state and swaps live, and the playground with its two streams.
import { csrf, show } from "./forms.js";
import { follow, replace } from "./live.js";

follow(`${location.pathname}/live`, { part: replace }, document.getElementById("live-state"));

const form = document.getElementById("playground");
const play = document.getElementById("play");
const stop = document.getElementById("stop");
let running = new AbortController();

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  running.abort();
  running = new AbortController();
  form.querySelector(".problem").hidden = true;
  play.disabled = true;
  stop.disabled = false;
  const fields = () => new URLSearchParams(new FormData(form));
  const base = fields();
  base.set("version", "base");
  await Promise.all([complete("base", base), complete("adapter", fields())]);
  play.disabled = false;
  stop.disabled = true;
});
stop.addEventListener("click", () => running.abort());

async function complete(side, fields) {
  const out = document.getElementById(`answer-${side}`);
  const facts = document.getElementById(`facts-${side}`);
  out.replaceChildren();
  facts.textContent = "";
  const made = document.createElement("mark");
  const before = fields.get("prefix").split("\n").slice(-3).join("\n");
  out.append(before, made, fields.get("suffix").split("\n").slice(0, 3).join("\n"));
  try {
    const headers = { accept: "text/event-stream", "x-csrf-token": csrf() };
    const response = await fetch(form.dataset.action, { method: "POST", body: fields, headers, signal: running.signal });
    if (!response.ok) throw (await response.json()).error;
    for await (const [kind, data] of events(response.body)) {
      if (kind === "text") made.append(JSON.parse(data));
      if (kind === "failed") throw { message: data };
      if (kind === "started") {
        const started = JSON.parse(data);
        facts.textContent = `${started.checkpoint || started.model}, ${started.tokens} tokens read`;
      }
      if (kind === "finished") {
        const end = JSON.parse(data);
        facts.textContent += `; ${end.tokens} written in ${end.seconds.toFixed(2)} s, the first after ${end.first.toFixed(2)} s (${end.reason})`;
      }
    }
  } catch (problem) {
    if (problem.name === "AbortError") facts.textContent += "; stopped";
    else show(form, problem);
  }
}

// The events of a response: EventSource itself sends no forms.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n");
      const kind = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      if (kind) yield [kind, data.join("\n")];
    }
  }
}
