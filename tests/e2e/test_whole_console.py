"""The whole way from an empty project to a swapped adapter, clicked in a real browser: the real stack, the real model.

Each part of the way is a fixture that the next one stands on. After every test nothing may have gone wrong in the
browser, and wherever somebody looks, pictures are taken and axe looks too (tests/e2e/chromium.py).
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.e2e import console_story as story
from tests.e2e.chromium import Desk, in_tab, window
from tests.e2e.test_whole_path import make_archive, make_bundle, package
from tests.servers import ssh
from tests.servers.relay import Relay, relaying

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def relay(stack: dict[str, str]) -> Iterator[Relay]:
    """What the browser's connections go through, so that they can be broken."""
    with relaying(stack["gateway"]) as it:
        yield it


@pytest.fixture(scope="module")
def person(relay: Relay, stack: dict[str, str]) -> Iterator[Desk]:
    """Somebody who has signed in as an operator."""
    with window(f"http://{relay.address}") as it:
        story.sign_in(it, stack["key"])
        yield it


@pytest.fixture(autouse=True)
def nothing_went_wrong(person: Desk) -> Iterator[None]:
    yield
    troubles, person.troubles[:] = list(person.troubles), []
    assert troubles == [], "\n".join(troubles)


@pytest.fixture(scope="module")
def sources(person: Desk, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An archive, a file and a private repository in a new project; gives their ids."""
    folder = tmp_path_factory.mktemp("console")
    make_bundle(folder)
    story.new_project(person)
    story.add_files(person, make_archive(folder), package() / "commonconfig.py")
    with ssh.serving(folder / "ssh") as server:
        story.add_repository(person, server, folder / "repo")
    return person.page.locator("#sources h3 a").all_inner_texts()


@pytest.fixture(scope="module")
def started(person: Desk, sources: list[str]) -> str:
    """A scan that is over and a run that goes on; gives its id."""
    story.settle_project(person)
    story.ask_too_early(person)
    story.scan(person)
    return story.start_run(person, "First")


@pytest.fixture(scope="module")
def trained(person: Desk, started: str) -> str:
    """The run is over, and its best adapter serves."""
    story.finish_run(person, started)
    return started


@pytest.fixture(scope="module")
def second(person: Desk, trained: str) -> str:
    """One more run, which goes on. It learns too little to be better than the first.

    Who has the list of runs open sees it come.
    """
    onlooker = in_tab(person.page.context, person.url)
    onlooker.page.goto(f"{person.url}/console/p/{story.PROJECT}/training")
    expect(onlooker.at("live-state")).to_have_text("Live")
    run = story.start_run(person, "Second", train_steps="2", learning_rate="1e-3", proof_places="0")
    expect(onlooker.at(f"run-{run}")).to_contain_text("Second")
    person.troubles += onlooker.troubles
    onlooker.page.close()
    return run


def test_sources_come_from_the_disk_and_from_a_private_repository(sources: list[str]) -> None:
    assert sources == ["app", "commonconfig-py", "package"]


def test_a_live_page_survives_a_broken_connection(person: Desk, started: str, relay: Relay) -> None:
    person.page.goto(f"{person.url}/console/p/{story.PROJECT}/training/{started}")
    story.lose_and_find_again(person, relay)
    lines = person.at("log").inner_text().splitlines()
    assert len([line for line in lines if "plan:" in line]) == 1, "the story goes on where it stopped"
    person.look("17-run-live")


def test_system_keys_and_audit_log(person: Desk, started: str) -> None:
    """Soon after the run's first words: it goes on, and is the one job."""
    person.click("nav-system")
    expect(person.at("health").locator(".state")).to_have_text(["serving"] * 4)
    expect(person.at("jobs").locator("tbody tr")).to_contain_text(["running"])
    story.press_while_it_changes(person, f"job-{started}", "all-jobs")
    expect(person.at("run-state")).to_be_visible()
    story.longest_name(person)
    person.click("nav-system")
    person.look("20-system")
    secret = story.make_key(person, "ci", "reader")
    story.sign_in_as_reader(person, secret)
    story.rotate_and_revoke(person, "ci", secret)
    person.click("audit")
    expect(person.at("records").locator("tbody tr").filter(has_text="RevokeKey")).to_have_count(1)
    person.look("24-audit")


def test_a_plan_tells_why_and_refuses_nonsense(person: Desk, started: str) -> None:
    story.plan(person)


def test_the_dataset_is_explained(person: Desk, started: str) -> None:
    person.page.goto(f"{person.url}/console/p/{story.PROJECT}/dataset")
    expect(person.at("funnel").locator("td.number")).to_have_text(["17", "10", "10", "9", "1"])
    here, there = story.drag_threshold(person)
    assert " 0 files more would be rejected" in here and " 10 files more would be rejected" in there
    assert person.page.locator("#histogram g.changes").count() > 0
    why = story.explain(person, "LOTS_OF_DIGITS")
    assert re.match(r"LOTS_OF_DIGITS: 9\d\.\d% of the characters\n", why) and "data rather than code" in why
    story.switch_language(person, "Text")


def test_a_run_leaves_checkpoints_to_take_home(person: Desk, second: str, trained: str, tmp_path: Path) -> None:
    story.finish_run(person, trained)
    drawn = re.compile(r"Losses up to step 4: best test loss \d\.\d{4} at step [24]")
    expect(person.at("curves")).to_have_attribute("aria-label", drawn)
    assert person.at("curves").locator("circle.best").count() == 1
    person.look("18-run", crossed=True)
    with person.page.expect_download() as download:
        person.click("download-4")
    download.value.save_as(tmp_path / "adapter.tar")
    with tarfile.open(tmp_path / "adapter.tar") as tar:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(tar.getnames())
    person.click("keep-4")
    expect(person.at("keep-4")).to_have_text("Let go")


def test_base_and_adapter_answer_beside_each_other(person: Desk, second: str, trained: str, relay: Relay) -> None:
    person.click("nav-serving")
    expect(person.at("active")).to_contain_text(f"{trained}/")
    expect(person.at("lineage")).to_contain_text("First")
    expect(person.at("lineage-commits")).to_contain_text("app at ")
    story.play(person, "def main(")
    assert person.at("facts-adapter").inner_text().startswith(f"{trained}/")
    assert person.at("facts-base").inner_text().startswith("smollm2-135m,")
    person.look("25-playground", crossed=True)
    person.fill(prefix="x = [\n" + "    0,\n    1,\n" * 12, max_tokens="512")  # no model sees an end to that
    with relay.slow():
        person.click("play")
        expect(person.at("answer-adapter").locator("mark")).not_to_be_empty()
        person.click("stop")
        for side in ("base", "adapter"):
            expect(person.at(f"facts-{side}")).to_contain_text("stopped")


def test_more_live_tabs_than_a_browser_has_connections(person: Desk, trained: str) -> None:
    story.open_many_tabs(person)


def test_swaps_are_seen_as_they_happen_and_taken_back(person: Desk, trained: str, second: str) -> None:
    onlooker = in_tab(person.page.context, person.url)
    onlooker.troubles = person.troubles
    onlooker.page.goto(f"{person.url}/console/p/{story.PROJECT}/serving")
    active, swaps = onlooker.at("active"), onlooker.at("swaps").locator("tbody tr")
    before = active.inner_text()
    story.finish_run(person, second)
    person.click("nav-serving")
    expect(person.at("waiting")).to_contain_text(f"{second}/2")
    person.look("26-serving-waiting")
    assert active.inner_text() == before, "what is worse on the same test set waits for a person"
    person.click("approve")
    for there, told in ((active, f"{second}/2"), (swaps.first, f"{second}/2"), (swaps.nth(1), before)):
        expect(there).to_contain_text(told)
    expect(onlooker.at("lineage")).to_contain_text("Second")
    story.choose(person, "off")
    expect(active).to_have_text("the base model")
    expect(onlooker.at("came-from")).to_contain_text("The base model answers")
    story.choose(person, "pinned", before)
    expect(active).to_have_text(before)
    person.click("nav-training")
    person.page.locator(f"#run-{second} th a").click()
    person.click("serve-2")
    expect(active).to_have_text(f"{second}/2")
    expect(person.at("history").locator("tbody tr")).to_have_count(4)
    person.look("29-serving-history")
    onlooker.page.close()


def test_two_runs_beside_each_other(person: Desk, trained: str, second: str) -> None:
    story.finish_run(person, second)
    story.compare(person, trained, second)
    differing = person.at("compared").locator("tr", has=person.page.locator("td strong"))
    assert {"train_steps", "learning_rate"} <= set(differing.locator("th").all_inner_texts())


def test_signing_out_ends_it(person: Desk) -> None:
    with person.expecting("404"):
        person.page.goto(f"{person.url}/console/nowhere")
    person.look("30-not-found")
    person.click("sign-out")
    person.page.goto(f"{person.url}/console/system")
    expect(person.at("sign-in")).to_be_visible()
