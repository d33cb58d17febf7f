// A run's page, and that of two runs: curves and log as the stream brings them.
import { add, draw, empty } from "./curves.js";
import { ended, follow, replace } from "./live.js";

const svg = document.getElementById("curves");
const log = document.getElementById("log");
const speed = document.getElementById("speed");
const runs = [svg.dataset.run, svg.dataset.other].filter(Boolean).map((address) => {
  const run = empty();
  const handlers = {
    points: (data) => {
      const points = JSON.parse(data);
      add(run, points);
      schedule();
      if (log) tell(points.lines);
      if (speed && points.speed) speed.textContent = `${Math.round(points.speed).toLocaleString("en")} tokens/s`;
    },
  };
  if (log) Object.assign(handlers, { part: replace, ended: () => ended(svg) });
  follow(address, handlers, document.getElementById("live-state"));
  return run;
});

let waiting = false;
new ResizeObserver(schedule).observe(svg);
function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw(svg, runs);
  });
}

function tell(lines) {
  const below = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
  for (const [when, words] of lines) {
    const line = log.appendChild(document.createElement("li"));
    const time = line.appendChild(document.createElement("time"));
    time.dateTime = when;
    time.textContent = when.slice(11, 19);
    line.append(words);
  }
  if (below) log.scrollTop = log.scrollHeight;
}
