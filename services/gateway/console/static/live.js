// Live parts: an element with data-live names a stream of server-sent events, see console/live.py. A broken connection is
// taken up again by the browser, which tells how far it came.

const policy = globalThis.trustedTypes?.createPolicy("codegraft-parts", { createHTML: (html) => html });

export function followAll(within) {
  for (const each of within.querySelectorAll("[data-live]")) {
    const state = each.querySelector("[role=status]") ?? document.getElementById("live-state");
    follow(each.dataset.live, { part: replace, ended: () => ended(each) }, state);
  }
}

let leaving = 0;
addEventListener("beforeunload", () => (leaving = Date.now()));

// What has ended may have more to show than its live parts. To load the page anew would take back a click that is on its
// way to another page: it is waited for.
export function ended(element) {
  if (element.dataset.ended === "reload") setTimeout(() => location.reload(), Date.now() - leaving < 3000 ? 3000 : 0);
}

// Follows a stream; handlers are called with the data of their kind of event.
export function follow(address, handlers, state) {
  const source = new EventSource(address);
  const tell = (text, kind) => {
    if (!state) return;
    state.textContent = text;
    state.dataset.kind = kind;
  };
  source.addEventListener("open", () => tell("Live", "on"));
  const { ended: whenOver, ...kinds } = handlers;
  for (const [kind, handler] of Object.entries(kinds)) {
    source.addEventListener(kind, (event) => handler(event.data));
  }
  source.addEventListener("end", () => {
    source.close();
    tell("", "off");
    whenOver?.();
  });
  source.addEventListener("failed", (event) => {
    source.close();
    tell(event.data, "failed");
  });
  source.addEventListener("error", () => {
    const over = source.readyState === EventSource.CLOSED;
    tell(over ? "Not live any more: load the page again." : "Connection lost, coming back …", "lost");
  });
  addEventListener("pagehide", () => source.close(), { once: true });
  return source;
}

// Puts the server's HTML in the place of the element with its id; the focus stays where it is.
export function replace(html) {
  const trusted = policy ? policy.createHTML(html) : html;
  const part = new DOMParser().parseFromString(trusted, "text/html").body.firstElementChild;
  const old = part && document.getElementById(part.id);
  if (!old) return;
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  const open = [...old.querySelectorAll("details[open][id]")].map((each) => each.id);
  old.replaceWith(document.adoptNode(part));
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  if (focused) document.getElementById(focused)?.focus();
}
