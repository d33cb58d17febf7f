// Files from the disk into a source: hashed, asked for, sent from where they stopped, and made a source.
import { Sha256 } from "./sha256.js";
import { answer, csrf, post } from "./forms.js";
import { refresh } from "./live.js";

const ARCHIVE = /\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst))$/i;
const TRIES = 6;
const PIECE = 4 << 20;

const form = document.getElementById("upload");
const list = document.getElementById("transfers");
const drop = document.getElementById("drop");
const chosen = document.getElementById("files");

form.addEventListener("submit", (event) => event.preventDefault());
chosen.addEventListener("change", () => take([...chosen.files]));
drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.dataset.over = "";
});
drop.addEventListener("dragleave", () => delete drop.dataset.over);
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  delete drop.dataset.over;
  const files = [];
  for (const item of event.dataTransfer.items) {
    const file = item.getAsFile();
    if (item.webkitGetAsEntry()?.isDirectory) fail(begin(file).state, "This is a folder: pack it into a zip or tar first.");
    else if (file) files.push(file);
  }
  take(files);
});
// A file that misses the field would take the page's place.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());

let running = 0;
// To leave the page would break off what is on its way.
addEventListener("beforeunload", (event) => running && event.preventDefault());

async function take(files) {
  const settings = new FormData(form); // as they are now: those of the next files may be chosen while these are sent
  settings.delete("files");
  chosen.value = ""; // or the same file could not be chosen again
  running++;
  for (const file of files) await bring(file, new URLSearchParams(settings));
  running--;
}

// A line for a file, with its progress and how it stands.
function begin(file) {
  const line = list.appendChild(document.createElement("li"));
  const name = line.appendChild(document.createElement("span"));
  const bar = line.appendChild(document.createElement("progress"));
  const state = line.appendChild(document.createElement("span"));
  name.textContent = file.name;
  bar.max = Math.max(1, file.size);
  bar.value = 0;
  bar.setAttribute("aria-label", `Progress of ${file.name}`);
  return { bar, state };
}

function fail(state, words) {
  state.className = "problem";
  state.textContent = words;
}

async function bring(file, fields) {
  const { bar, state } = begin(file);
  try {
    state.textContent = "reading";
    const sha256 = await digest(file, (done) => (bar.value = done));
    state.textContent = "sending";
    const upload = await send(file, sha256, (done) => (bar.value = done));
    fields.set("upload", upload.name);
    fields.set("path", file.name);
    fields.set("kind", ARCHIVE.test(file.name) ? "archive" : /\.bundle$/i.test(file.name) ? "bundle" : "file");
    await post(form.dataset.action, fields);
    bar.value = bar.max;
    state.textContent = "done";
    await refresh();
  } catch (problem) {
    fail(state, problem.message ?? String(problem));
  }
}

async function digest(file, tell) {
  const hash = new Sha256();
  for (let at = 0; at < file.size; at += PIECE) {
    hash.update(new Uint8Array(await file.slice(at, at + PIECE).arrayBuffer()));
    tell(at);
  }
  return hash.hex();
}

// As often as it takes, as long as something arrives in between.
async function send(file, sha256, tell) {
  const address = `${form.dataset.upload}/${sha256}`;
  let reached = -1;
  for (let failures = 0; ; failures++) {
    try {
      const there = await answer(await fetch(address, { headers: { accept: "application/json" } }));
      if (there.complete) return there;
      if (there.offset > reached) [reached, failures] = [there.offset, 0];
      const query = new URLSearchParams({ offset: there.offset, size: file.size, filename: file.name });
      return await put(`${address}?${query}`, file.slice(there.offset), (sent) => tell(there.offset + sent));
    } catch (problem) {
      const passing = !problem.code || problem.code === "UPLOAD_MISMATCH" || problem.code.endsWith("UNAVAILABLE");
      if (!passing || failures + 1 >= TRIES) throw problem;
      await new Promise((go) => setTimeout(go, 500 * 2 ** failures));
    }
  }
}

// fetch does not tell how much was sent.
function put(address, body, tell) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("PUT", address);
    request.setRequestHeader("content-type", "application/octet-stream");
    request.setRequestHeader("accept", "application/json");
    request.setRequestHeader("x-csrf-token", csrf());
    request.responseType = "json";
    request.upload.addEventListener("progress", (event) => tell(event.loaded));
    request.addEventListener("load", () => {
      const said = request.response;
      if (request.status === 200) done(said);
      else failed(said?.error ?? { message: `HTTP ${request.status}` });
    });
    request.addEventListener("error", () => failed({ message: "The connection broke." }));
    request.send(body);
  });
}
