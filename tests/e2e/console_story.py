"""A person's way through the console, from nothing to a swapped adapter: what is clicked, and what then is there."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import expect

from tests.e2e.chromium import Desk, in_tab
from tests.servers.relay import Relay
from tests.servers.ssh import SshServer

PROJECT = "console"
SCAN = {"max_tokens_per_file": "256", "window_tokens": "256"}
RUN = {
    "lora_r": "4",
    "learning_rate": "2e-3",
    "train_steps": "4",
    "batch_size": "2",
    "context_length": "128",
    "warmup_steps": "1",
    "eval_steps": "2",
    "max_eval_tokens": "256",
    "proof_places": "2",
}
"""Settings that train within seconds; the others stay AUTO."""


def sign_in(desk: Desk, key: str) -> None:
    """With a key that does not exist, then with one that does."""
    desk.page.goto(f"{desk.url}/console")
    desk.look("00-sign-in")
    desk.fill(key="cg_nobody_0123456789abcdef")
    with desk.expecting("401"):
        desk.click("sign-in")
        expect(desk.at("problem")).to_be_visible()
    desk.look("01-sign-in-refused")
    desk.fill(key=key)
    desk.click("sign-in")
    expect(desk.page.get_by_role("heading", name="Projects")).to_be_visible()


def tab_to(desk: Desk, id: str, most: int = 40) -> None:
    """Presses Tab until this element has the focus. Every stop on the way shows that it has it, within the window."""
    for _ in range(most):
        desk.page.keyboard.press("Tab")
        focused = desk.page.locator(":focus")
        assert focused.evaluate("it => getComputedStyle(it).outlineStyle") != "none", focused.inner_html()
        expect(focused).to_be_in_viewport()
        if focused.get_attribute("id") == id:
            return
    raise AssertionError(f"#{id} is not reached by {most} times Tab")


def new_project(desk: Desk) -> None:
    """Made with nothing but the keyboard."""
    keyboard = desk.page.keyboard
    desk.page.reload()
    keyboard.press("Tab")
    expect(desk.page.locator(":focus")).to_have_text("Skip to the content")
    keyboard.press("Enter")
    expect(desk.at("main")).to_be_focused()
    tab_to(desk, "project_id")
    keyboard.type("No good id")
    with desk.expecting("400"):
        keyboard.press("Enter")
        expect(desk.at("project_id")).to_have_attribute("aria-invalid", "true")
    expect(desk.at("project_id")).to_be_focused()
    desk.look("02-projects-wrong-id")
    keyboard.press("ControlOrMeta+a")
    keyboard.type(PROJECT)
    tab_to(desk, "title")
    keyboard.type("Made by clicking")
    tab_to(desk, "create-project")
    keyboard.press("Space")
    expect(desk.at("no-sources")).to_be_visible()


def longest_name(desk: Desk) -> None:
    """A project whose id is as long as one may be, and cannot be broken at a blank or hyphen."""
    desk.click("nav-projects")
    desk.fill(project_id="x" * 64, title="ohne Ende " * 20 + "\u202e<b>" + "y" * 80)
    desk.click("create-project")
    expect(desk.at("no-sources")).to_be_visible()
    desk.look("06-long-name")


def add_files(desk: Desk, archive: Path, held_out: Path) -> None:
    """An archive from the file picker; a file by drag and drop, for the test part only. Meanwhile a form is filled in:
    what is typed stays, and so does the focus."""
    desk.page.wait_for_load_state()
    desk.look("03-sources-none")
    desk.fill(git__source_id="app")
    with desk.page.expect_file_chooser() as chooser:
        desk.page.get_by_label("Drop files here, or choose them").click()
    desk.at("upload").get_by_text("Split and masks").click()
    desk.fill(upload__exclude="masked.py")
    chooser.value.set_files(archive)
    states = desk.page.locator("#sources .state")
    expect(states).to_have_text(["ready"])
    desk.at("upload-split").select_option("test")
    desk.fill(upload__exclude="")
    desk.at("git-ref").focus()
    desk.drop(held_out.parent, "drop")
    expect(desk.at("transfers").locator(".problem")).to_have_text(re.compile("folder: pack it"))
    desk.drop(held_out, "drop")
    expect(states).to_have_text(["ready", "ready"])
    expect(desk.at("git-ref")).to_be_focused()
    expect(desk.at("git-source_id")).to_have_value("app")


def add_repository(desk: Desk, server: SshServer, repository: Path) -> None:
    """A private one over ssh, with a key that is made and copied here."""
    desk.fill(git__url=server.url(repository))
    desk.fill(ssh__credential_id="deploy", ssh__title="for the repository", ssh__known_hosts=server.host_key)
    desk.click("generate-key")
    expect(desk.at("add-ssh").get_by_role("status")).to_have_text("Done.")
    expect(desk.at("generate-key")).to_be_focused()
    expect(desk.at("ssh-credential_id")).to_have_value("")
    desk.click("copy-deploy")
    expect(desk.at("copy-deploy")).to_have_text("Copied")
    copied = desk.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("ssh-ed25519 ")
    server.admit(copied)
    desk.at("git-credential").select_option("deploy")
    desk.click("add-git-button")
    expect(desk.at("source-app-state")).to_have_text("ready")
    expect(desk.at("source-app")).to_contain_text("Commit")
    desk.look("04-sources", crossed=True)
    desk.at("source-app").get_by_role("link", name="Settings").click()
    desk.fill(train_masks="*.py")
    desk.look("05-source")
    with desk.loading():
        desk.click("save-source")
    expect(desk.at("source-app-state")).to_have_text("ready")


def settle_project(desk: Desk) -> None:
    """Masks and licences of the whole project."""
    desk.click("project")
    desk.fill(exclude="*.generated.py", exclude_licenses="GPL-*")
    desk.look("07-project")
    desk.click("save-project")
    expect(desk.at("project-settings").get_by_role("status")).to_have_text("Done.")
    desk.page.reload()
    expect(desk.at("exclude")).to_have_value("*.generated.py")


def scan(desk: Desk) -> None:
    """Started, and followed to its end; the page shows each state and then the report by itself."""
    desk.click("nav-dataset")
    expect(desk.at("no-scans")).to_be_visible()
    desk.look("10-dataset-none")
    desk.click("new-scan")
    desk.fill(**SCAN)
    desk.look("11-scan-new")
    desk.click("start")
    expect(desk.at("state")).to_have_text("succeeded")
    expect(desk.at("languages")).to_be_visible()
    desk.look("12-dataset", crossed=True)


def drag_threshold(desk: Desk) -> tuple[str, str]:
    """With the mouse from where it is to the left, where everything is above it; gives what was told of both places."""
    slider, preview = desk.at("threshold"), desk.at("preview")
    slider.focus()
    slider.press("ArrowLeft")
    expect(preview).to_contain_text("more would be rejected")
    before = preview.inner_text()
    box = slider.bounding_box()
    assert box
    low, high = float(slider.get_attribute("min") or 0), float(slider.get_attribute("max") or 0)
    share = (float(slider.input_value()) - low) / (high - low)
    mouse, thumb, level = desk.page.mouse, 16, box["y"] + box["height"] / 2
    mouse.move(box["x"] + thumb / 2 + (box["width"] - thumb) * share, level)
    mouse.down()
    mouse.move(box["x"] + 20, level, steps=10)
    mouse.up()
    # On the way there are other answers; under load they come late.
    expect(preview).to_contain_text(f"At {float(slider.input_value()):.2f}:")
    desk.look("13-dataset-threshold")
    return before, preview.inner_text()


def explain(desk: Desk, reason: str) -> str:
    """From the table of reasons to one file's verdict."""
    desk.at("reasons").get_by_role("link", name=reason).click()
    expect(desk.at("files")).to_be_visible()
    desk.look("14-files")
    desk.page.locator("#files tbody th a, #files tbody td a").first.click()
    expect(desk.at("why")).to_be_visible()
    desk.look("15-file")
    return desk.at("why").inner_text()


def switch_language(desk: Desk, language: str) -> None:
    """Off, and on again."""
    desk.click("nav-dataset")
    box = desk.page.get_by_role("checkbox", name=language)
    for on in (False, True):
        box.set_checked(on)
        desk.click("save-languages")
        expect(desk.at("languages-form").get_by_role("status")).to_have_text("Done.")
        desk.page.reload()
        expect(box).to_be_checked(checked=on)


def ask_too_early(desk: Desk) -> None:
    """For a plan, before there is a dataset."""
    desk.click("nav-training")
    expect(desk.at("no-runs")).to_be_visible()
    desk.look("08-training-none")
    desk.click("new-run")
    expect(desk.at("plan-problem")).to_contain_text("dataset")
    desk.look("09-run-without-dataset")


def start_run(desk: Desk, title: str, **settings: str) -> str:
    """With settings by hand; gives the run's id."""
    desk.click("nav-training")
    desk.click("new-run")
    expect(desk.at("plan")).to_be_visible()
    desk.fill(title=title, **RUN | settings)
    desk.click("start")
    expect(desk.at("run-state")).to_be_visible()
    return desk.page.url.rpartition("/")[2]


def plan(desk: Desk) -> None:
    """A look at what the settings come to and why, and one that is out of its range."""
    desk.page.goto(f"{desk.url}/console/p/{PROJECT}/training")
    desk.click("new-run")
    desk.fill(**RUN)
    desk.click("show-plan")
    expect(desk.at("plan").locator("dd").first).to_have_text(RUN["train_steps"])
    expect(desk.at("lora_alpha-hint")).to_contain_text("twice the rank")
    desk.look("16-plan")
    desk.fill(lora_dropout="7")
    with desk.expecting("400"):
        desk.click("start")
        expect(desk.at("lora_dropout")).to_have_attribute("aria-invalid", "true")
    expect(desk.page.get_by_role("alert").filter(visible=True)).to_contain_text("0 to 0.9")


def lose_and_find_again(desk: Desk, relay: Relay) -> None:
    """The connection breaks while a page is live, and comes back by itself."""
    state = desk.at("live-state")
    expect(state).to_have_attribute("data-kind", "on")
    expect(desk.at("log")).to_contain_text("plan:")
    with desk.expecting("ERR_"):
        with relay.broken():
            expect(state).to_have_attribute("data-kind", "lost")
        expect(state).to_have_attribute("data-kind", "on")


def look_away(desk: Desk, hidden: bool = True) -> None:
    """As when another tab is chosen, which a browser without a screen does not tell its pages."""
    desk.page.evaluate(
        "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange')); }",
        hidden,
    )


def open_many_tabs(desk: Desk, many: int = 8) -> None:
    """More live pages than a browser has connections; the first goes on when it is looked at again."""
    desk.click("nav-serving")
    expect(desk.at("live-state")).to_have_text("Live")
    look_away(desk)
    tabs = []
    for _ in range(many):
        tabs.append(in_tab(desk.page.context, desk.url))
        tabs[-1].page.goto(f"{desk.url}/console/p/{PROJECT}/sources")
        expect(tabs[-1].at("live-state")).to_have_text("Live")
        look_away(tabs[-1])
    desk.page.evaluate("document.getElementById('live-state').textContent = ''")
    look_away(desk, hidden=False)
    expect(desk.at("live-state")).to_have_text("Live")
    for tab in tabs:
        desk.troubles += tab.troubles
        tab.page.close()


def finish_run(desk: Desk, run: str) -> None:
    """Waits for its end on its page, and until the page has loaded itself anew then."""
    desk.page.goto(f"{desk.url}/console/p/{PROJECT}/training/{run}")
    expect(desk.page.locator("#curves:not([data-ended])")).to_be_attached(timeout=240_000)
    expect(desk.at("state")).to_have_text("succeeded")
    expect(desk.at("log")).to_contain_text("best so far")


def compare(desk: Desk, first: str, second: str) -> None:
    """Two runs beside each other."""
    desk.click("nav-training")
    expect(desk.at("compare")).to_be_visible()
    desk.look("27-training")
    desk.page.get_by_role("radio", name=f"{first} as the first").check()
    desk.page.get_by_role("radio", name=f"{second} as the second").check()
    desk.click("compare-button")
    expect(desk.at("curves")).to_have_attribute("aria-label", re.compile("best test loss.*; and best test loss"))
    desk.look("28-compare")


def play(desk: Desk, prefix: str) -> None:
    """Both sides complete the same text."""
    desk.fill(prefix=prefix, max_tokens="24")
    desk.click("play")
    for side in ("base", "adapter"):
        expect(desk.at(f"answer-{side}").locator("mark")).not_to_be_empty()
    for side in ("base", "adapter"):
        expect(desk.at(f"facts-{side}")).to_contain_text("written in")


def choose(desk: Desk, mode: str, checkpoint: str = "") -> None:
    """Sets the policy and waits for the replica. What is typed into the playground stays."""
    with desk.loading():
        desk.click("nav-serving")
    with desk.loading():
        desk.page.get_by_role("link", name="30 days").click()
    desk.fill(prefix="def typed_meanwhile(")
    desk.at(f"mode-{mode}").check()
    if checkpoint:
        desk.fill(checkpoint=checkpoint)
    desk.click("set-policy")
    expect(desk.at("policy").get_by_role("status")).to_have_text("Done.")
    expect(desk.at(f"mode-{mode}")).to_be_checked()
    expect(desk.at("prefix")).to_have_value("def typed_meanwhile(")
    assert desk.page.url.endswith("?days=30")
    expect(desk.at("converged")).to_have_text("serving")


def press_while_it_changes(desk: Desk, id: str, part: str) -> None:
    """A live part is replaced while a link in it is pressed: that is clicked all the same."""
    desk.at(id).hover()
    desk.page.mouse.down()
    anew = "async (id) => (await import('/console/static/live.js')).replace(document.getElementById(id).outerHTML)"
    desk.page.evaluate(anew, part)
    desk.page.mouse.up()


def make_key(desk: Desk, id: str, role: str) -> str:
    """Its secret is shown, once."""
    desk.fill(key_id=id, title="of a test")
    desk.at("role").select_option(role)
    desk.page.get_by_role("checkbox", name=PROJECT).check()
    desk.click("create-key")
    secret = desk.at("secret").inner_text()
    desk.look("21-key-made")
    desk.page.get_by_role("link", name="Done").click()
    expect(desk.at(f"key-{id}")).to_contain_text("active")
    assert secret not in desk.page.content()
    return secret


def sign_in_as_reader(operator: Desk, secret: str) -> None:
    """In a browser window of its own: what a reader may not is said, and what he may is there."""
    browser = operator.page.context.browser
    assert browser
    with browser.new_context(reduced_motion="reduce") as context:
        it = in_tab(context, operator.url)
        it.page.goto(f"{it.url}/console/p/{PROJECT}/dataset")
        it.fill(key=secret)
        it.click("sign-in")
        expect(it.at("funnel")).to_be_visible()
        it.click("nav-system")
        expect(it.at("keys-denied")).to_be_visible()
        with it.expecting("403"):
            it.click("audit")
            expect(it.at("problem")).to_be_visible()
        it.look("22-not-allowed")
        operator.troubles += it.troubles


def rotate_and_revoke(desk: Desk, id: str, secret: str) -> None:
    """A new secret, and then none that works."""
    desk.click(f"rotate-{id}")
    assert desk.at("secret").inner_text() != secret
    desk.page.get_by_role("link", name="Done").click()
    desk.page.once("dialog", lambda dialog: dialog.accept())
    desk.click(f"revoke-{id}")
    expect(desk.at(f"key-{id}")).to_contain_text("revoked")
