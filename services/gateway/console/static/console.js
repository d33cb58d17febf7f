// What every page has: forms that keep what was typed, live parts, buttons that copy.
import { followAll } from "./live.js";
import { sendForms } from "./forms.js";

sendForms(document);
followAll();

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  const text = document.getElementById(button.dataset.copy);
  getSelection().selectAllChildren(text);
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch {
    // Browsers give the clipboard to https and localhost only: what is selected can be copied by hand.
    button.textContent = "Selected: copy it with Ctrl-C";
  }
});
