// Live parts: an element with data-live names a stream of server-sent events, see console/live.py. A broken connection is
// taken up again by the browser, which tells how far it came. Parts with data-fresh are loaded anew after a change.

const policy = globalThis.trustedTypes?.createPolicy("codegraft-parts", { createHTML: (html) => html });
const streams = new Map();

// Follows the parts that there are now, and no more those that were replaced.
export function followAll() {
  for (const [part, stream] of streams) {
    if (part.isConnected) continue;
    stream.close();
    streams.delete(part);
  }
  for (const each of document.querySelectorAll("[data-live]")) {
    if (streams.has(each)) continue;
    const state = each.querySelector("[role=status]") ?? document.getElementById("live-state");
    streams.set(each, follow(each.dataset.live, { part: replace, ended: () => ended(each) }, state));
  }
}

let asked = 0;

// Loads the page anew, but shows only its parts with data-fresh: what is typed elsewhere stays, and so does what is on its
// way. The form that was sent is done, and starts afresh.
export async function refresh(sent) {
  const mine = ++asked;
  let page;
  try {
    const response = await fetch(location.href, { headers: { accept: "text/html" } });
    if (response.status >= 500) throw response; // a service is away
    page = parsed(await response.text());
  } catch {
    throw { message: "It is done, but cannot be shown now. Load the page again later.", param: null };
  }
  sent?.reset();
  if (mine !== asked) return; // a newer page is on its way
  const parts = page.querySelectorAll("[data-fresh]");
  if (!parts.length) location.reload(); // the session is over, or the thing is gone: that page says so
  for (const part of parts) put(part);
  followAll();
}

let leaving = 0;
addEventListener("beforeunload", () => (leaving = Date.now()));

// What has ended may have more to show than its live parts. To load the page anew would take back a click that is on its
// way to another page: it is waited for.
export function ended(element) {
  if (element.dataset.ended === "reload") setTimeout(() => location.reload(), Date.now() - leaving < 3000 ? 3000 : 0);
}

// Follows a stream; handlers are called with the data of their kind of event.
//
// A tab that nobody looks at has no connection: a browser opens six to one server, for all of its tabs together, and with
// a seventh live page nothing would load any more. When it is looked at again it goes on where it stopped.
export function follow(address, handlers, state) {
  const { ended: whenOver, ...kinds } = handlers;
  let source = null;
  let position = "";
  let lost = false;
  let over = false;
  const tell = (text, kind) => {
    if (!state) return;
    state.textContent = text;
    state.dataset.kind = kind;
  };
  const stop = () => {
    source?.close();
    source = null;
  };
  const close = () => {
    over = true;
    stop();
  };
  const look = () => {
    if (document.hidden && source) lost = true;
    if (document.hidden) stop();
    else if (!source && !over) begin();
  };
  const begin = () => {
    const way = new URL(address, location.href);
    if (position) way.searchParams.set("after", position);
    source = new EventSource(way);
    source.addEventListener("open", () => {
      tell("Live", "on");
      // What was added meanwhile has no part yet that the stream could replace.
      if (lost && document.querySelector("[data-fresh]")) refresh().catch(() => {});
      lost = false;
    });
    for (const [kind, handler] of Object.entries(kinds)) {
      source.addEventListener(kind, (event) => {
        position = event.lastEventId || position;
        handler(event.data);
      });
    }
    source.addEventListener("end", () => {
      close();
      tell("", "off");
      whenOver?.();
    });
    source.addEventListener("failed", (event) => {
      close();
      tell(event.data, "failed");
    });
    source.addEventListener("error", () => {
      lost = true;
      const refused = source?.readyState === EventSource.CLOSED;
      tell(refused ? "Not live any more: load the page again." : "Connection lost, coming back …", "lost");
    });
  };
  document.addEventListener("visibilitychange", look);
  addEventListener("pagehide", stop);
  addEventListener("pageshow", look);
  look();
  return { close };
}

// Puts the server's HTML in the place of the element with its id.
export function replace(html) {
  put(parsed(html).body.firstElementChild);
}

function parsed(html) {
  return new DOMParser().parseFromString(policy ? policy.createHTML(html) : html, "text/html");
}

const waiting = new Map();

// The focus stays where it is, what is open stays open, and what was typed or chosen stays, too.
function put(part) {
  const old = part && document.getElementById(part.id);
  if (!old) return;
  if (old.matches(":active")) {
    // A link or button that is replaced while it is pressed would not be clicked.
    waiting.set(part.id, part);
    setTimeout(() => waiting.get(part.id) === part && put(part), 100);
    return;
  }
  waiting.delete(part.id);
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  const open = [...old.querySelectorAll("details[open][id]")].map((each) => each.id);
  const typed = [...old.querySelectorAll("input[id], select[id], textarea[id]")].filter(isTyped);
  old.replaceWith(document.adoptNode(part));
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const each of typed) take(each, document.getElementById(each.id));
  if (focused) document.getElementById(focused)?.focus();
}

function isTyped(field) {
  if (field.type === "file") return false;
  if (field.options) return [...field.options].some((each) => each.selected !== each.defaultSelected);
  return field.checked !== field.defaultChecked || field.value !== field.defaultValue;
}

function take(before, field) {
  if (!field) return;
  if (!field.options) [field.value, field.checked] = [before.value, before.checked];
  else if ([...field.options].some((each) => each.value === before.value)) field.value = before.value;
  field.dispatchEvent(new Event("input", { bubbles: true })); // for what is drawn of it
}
