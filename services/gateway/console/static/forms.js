// Forms are sent by fetch, so that an error stands where it was made and nothing typed is lost, there or in other forms
// of the page. Without scripts they work as forms do.
import { refresh } from "./live.js";

export const csrf = () => document.querySelector("meta[name=csrf]").content;

export function sendForms() {
  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (!form.matches("form[data-send]") || event.submitter?.hasAttribute("formaction")) return;
    event.preventDefault();
    if (form.dataset.ask && !confirm(form.dataset.ask)) return;
    const button = event.submitter;
    if (button) button.disabled = true;
    try {
      const answer = await post(form.action, new URLSearchParams(new FormData(form, button)));
      await go(answer.location, form, button);
    } catch (problem) {
      show(form, problem);
      if (button) button.disabled = false;
    }
  });
}

// Sends a form; gives the answer, or throws {message, param}.
export async function post(address, fields) {
  let response;
  try {
    response = await fetch(address, {
      method: "POST",
      body: fields,
      headers: { accept: "application/json", "x-csrf-token": csrf() },
    });
  } catch {
    throw { message: "The gateway cannot be reached.", param: null };
  }
  return answer(response);
}

export async function answer(response) {
  const said = await response.json().catch(() => ({ error: { message: `HTTP ${response.status}`, param: null } }));
  if (!response.ok) throw said.error;
  return said;
}

async function go(way, form, button) {
  const target = new URL(way, location.href);
  // A page that is asked for something (?scan=, ?days=) stays with that.
  if (target.pathname !== location.pathname || !["", location.search].includes(target.search)) {
    location.assign(target);
  } else if (document.querySelector("[data-fresh]")) {
    await refresh(form);
    finish(form, button);
  } else {
    location.hash = target.hash;
    location.reload();
  }
}

// Says so. The focus goes back to the form's button, unless somebody took it elsewhere meanwhile.
function finish(form, button) {
  const now = document.getElementById(form.id) ?? form; // it may be part of what was loaded anew
  tell(now, "");
  const done = now.querySelector(".done");
  if (done) done.textContent = "Done.";
  if (!button) return;
  button.disabled = false;
  if ([null, document.body].includes(document.activeElement)) document.getElementById(button.id)?.focus();
}

export function show(form, problem) {
  tell(form, problem.message);
  const field = problem.param && form.elements.namedItem(problem.param.split(".").pop());
  if (field instanceof Element) {
    field.setAttribute("aria-invalid", "true");
    field.closest("details")?.setAttribute("open", "");
    field.focus();
  }
}

function tell(form, words) {
  const place = form.querySelector(".problem");
  place.textContent = words;
  place.hidden = !words;
  const done = form.querySelector(".done");
  if (done) done.textContent = "";
  for (const each of form.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
}
