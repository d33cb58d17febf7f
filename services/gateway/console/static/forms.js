// Forms are sent by fetch, so that an error stands where it was made and nothing typed is lost. Without scripts they
// work as forms do.

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
      go(answer.location);
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

function go(way) {
  const target = new URL(way, location.href);
  if (target.pathname === location.pathname && target.search === location.search) {
    location.hash = target.hash;
    location.reload();
  } else {
    location.assign(target);
  }
}

export function show(form, problem) {
  const place = form.querySelector(".problem");
  place.textContent = problem.message;
  place.hidden = false;
  const field = problem.param && form.elements.namedItem(problem.param.split(".").pop());
  for (const each of form.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
  if (field instanceof Element) {
    field.setAttribute("aria-invalid", "true");
    field.closest("details")?.setAttribute("open", "");
    field.focus();
  }
}
