// Loss curves as SVG. One or two runs: {train, test, best} are lists of [step, loss].

const SPACE = "http://www.w3.org/2000/svg";
const [LEFT, RIGHT, BOTTOM, TOP] = [46, 20, 24, 12];
const MOST = 600;

export const empty = () => ({ train: [], test: [], best: [] });

export function add(run, points) {
  for (const kind of ["train", "test", "best"]) run[kind].push(...points[kind]);
}

export function draw(svg, runs) {
  const all = runs.flatMap((run) => [...run.train, ...run.test]).filter(([, loss]) => Number.isFinite(loss));
  if (!all.length) return;
  // In the pixels of the screen, so that words keep their size on a small one.
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  const last = all.reduce((most, [step]) => Math.max(most, step), 1);
  // The first few steps of a fresh run may lie far above everything that is worth a look.
  const sorted = all.map(([, loss]) => loss).sort((a, b) => a - b);
  const low = sorted[0], high = Math.max(sorted[Math.ceil(sorted.length * 0.99) - 1], low + 0.05);
  const margin = (high - low) * 0.08;
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * step) / last;
  const y = (loss) => TOP + (height - TOP - BOTTOM) * (1 - (Math.min(loss, high + margin) - low + margin) / (high - low + 2 * margin));
  const parts = [];
  for (const tick of ticks(low - margin, high + margin, 5)) {
    parts.push(element("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
    parts.push(text(LEFT - 6, y(tick) + 4, tick.toFixed(2), "end"));
  }
  for (const tick of ticks(0, last, Math.min(last, width / 90))) parts.push(text(x(tick), height - 6, tick.toLocaleString("en"), "middle"));
  const words = runs.map((run, index) => {
    const other = index ? " other" : "";
    const line = (points) => points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
    parts.push(element("polyline", { class: `train${other}`, points: line(thinned(run.train)) }));
    parts.push(element("polyline", { class: `test${other}`, points: line(run.test) }));
    const base = run.test.find(([step]) => step === 0);
    if (base) parts.push(element("line", { class: "base", x1: LEFT, x2: width - RIGHT, y1: y(base[1]), y2: y(base[1]) }));
    for (const [step, loss] of run.test) {
      const point = element("circle", { class: "point", cx: x(step), cy: y(loss), r: 2.5 });
      point.append(titled(`step ${step}: test loss ${loss.toFixed(4)}`));
      parts.push(point);
    }
    const best = run.best.at(-1);
    if (!best) return "no best yet";
    const ring = element("circle", { class: "best", cx: x(best[0]), cy: y(best[1]), r: 6 });
    ring.append(titled(`best: ${best[1].toFixed(4)} at step ${best[0]}`));
    parts.push(ring);
    return `best test loss ${best[1].toFixed(4)} at step ${best[0]}`;
  });
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", `Losses up to step ${last}: ${words.join("; and ")}`);
}

// Means of so many neighbours that the line has no more points than a screen.
function thinned(points) {
  const size = Math.ceil(points.length / MOST);
  if (size <= 1) return points;
  const found = [];
  for (let at = 0; at < points.length; at += size) {
    const some = points.slice(at, at + size);
    found.push([some.at(-1)[0], some.reduce((sum, [, loss]) => sum + loss, 0) / some.length]);
  }
  return found;
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(tick);
  return found;
}

function element(name, attributes) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function titled(words) {
  const title = element("title", {});
  title.textContent = words;
  return title;
}

function text(x, y, words, anchor) {
  const made = element("text", { x, y, "text-anchor": anchor });
  made.textContent = words;
  return made;
}
