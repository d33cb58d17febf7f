// The threshold of a scan's losses: what another one would change is shown at once by the bars, then exactly by the service.
import { answer } from "./forms.js";

let asked = 0;
let timer;

// The report is replaced while a scan runs, so nothing is tied to its elements.
document.addEventListener("input", (event) => {
  if (event.target.id !== "threshold") return;
  const value = Number(event.target.value);
  document.getElementById("threshold-value").textContent = value.toFixed(2);
  mark(document.getElementById("histogram"), value);
  clearTimeout(timer);
  timer = setTimeout(() => preview(event.target.form, value), 150);
});

function mark(svg, value) {
  const [low, high, now] = [svg.dataset.low, svg.dataset.high, svg.dataset.threshold].map(Number);
  const line = document.getElementById("threshold-line");
  const at = (760 * (value - low)) / (high - low);
  line.setAttribute("x1", at);
  line.setAttribute("x2", at);
  for (const bar of svg.querySelectorAll("g")) {
    const middle = (Number(bar.dataset.low) + Number(bar.dataset.high)) / 2;
    const changes = (middle > value) !== (middle > now);
    bar.classList.toggle("changes", changes);
  }
}

async function preview(form, value) {
  const mine = ++asked;
  const told = document.getElementById("preview");
  try {
    const address = `${form.dataset.preview}&threshold=${value}`;
    const found = await answer(await fetch(address, { headers: { accept: "application/json" } }));
    if (mine !== asked) return;
    const files = (count) => `${count.toLocaleString("en")} ${count === 1 ? "file" : "files"}`;
    told.textContent = `At ${value.toFixed(2)}: ${files(found.leaving)} more would be rejected, ${files(found.coming)} more accepted.`;
    list("preview-leaving", found.leaving_paths);
    list("preview-coming", found.coming_paths);
  } catch (problem) {
    if (mine === asked) told.textContent = problem.message;
  }
}

function list(id, paths) {
  document.getElementById(id).replaceChildren(
    ...paths.map((path) => {
      const line = document.createElement("li");
      line.textContent = path;
      return line;
    }),
  );
}
