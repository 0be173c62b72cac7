"""report.html: one page that needs nothing else, says what happened, and is safe with what users write."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from argrpo_cli.recipe import Recipe, dump_recipe
from argrpo_cli.runs.curves import MOST_POINTS, panel_svg, panels
from argrpo_cli.runs.report import MOST_GRIDS, refresh_report, with_error, write_report
from argrpo_cli.runs.run import RunDirectory
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import write_json, write_jsonl, write_text
from argrpo_cli.training import run_training
from tests.runs.records import ROLES, record
from tests.training.tiny import FakeRewards, tiny_recipe

VOID = {"meta", "img", "input", "br", "link", "hr"}
ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element that opens also closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)

    @property
    def text(self) -> str:
        return " ".join(word for tag, words in self.words.items() if tag not in ("script", "style") for word in words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_run(root: Path, recipe: Recipe, records: list[dict[str, Any]], grids: list[int], **notes: Any) -> RunDirectory:
    """A run directory as training leaves it."""
    run = RunDirectory(root)
    write_text(run.recipe_file, dump_recipe(recipe))
    write_jsonl(run.metrics_file, records)
    write_json(run.notes_file, notes)
    run.grid_file(0).parent.mkdir()
    for step in grids:
        Image.new("RGB", (40, 30), (step % 256, 0, 0)).save(run.grid_file(step))
    return run


def page_of(run: RunDirectory, recipe: Recipe, **options: Any) -> Page:
    return Page(write_report(run, recipe, **options).read_text(encoding="utf-8"))


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe(rewards=["nano-clip", "nano-quality"], steps=100)


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunDirectory:
    return make_run(
        tmp_path / "run",
        recipe,
        [record(step) for step in range(1, 101)],
        [0, 50, 100],
        rewards=ROLES,
        finished={"step": 100, "out_of_time": False},
        versions={"argrpo": "9.9", "torch": "8.8"},
        device="an abacus",
        started="2030-01-02 03:04:05 UTC",
        warnings=[{"step": 7, "guard": "kl", "text": "the policy has left its base"}],
    )


def test_everything_is_in_the_page_and_nothing_outside(run: RunDirectory, recipe: Recipe) -> None:
    page = page_of(run, recipe)
    for tag, attributes in page.elements:
        for name in ADDRESSES & attributes.keys():
            assert attributes[name].startswith("data:image/"), (tag, name)
    assert not page.all("link")
    html = (run.root / "report.html").read_text(encoding="utf-8")
    for outside in ("http:", "https:", "//cdn", "@import", "url("):
        assert outside not in html


def test_the_page_says_what_happened(run: RunDirectory, recipe: Recipe) -> None:
    page = page_of(run, recipe)
    for part in ("tiny", "finished: 100 updates", "4:10", "step 7, kl: the policy has left its base", "an abacus",
                 "argrpo 9.9, torch 8.8", "2030-01-02 03:04:05 UTC", "before (step 0)", "after (step 100)", "step 50",
                 "reward, weighted total", "held out: judge", "learning_rate: 0.001"):  # fmt: skip
        assert part in page.text, part
    (state,) = [attributes for attributes in page.all("p") if attributes.get("class") == "state"]
    assert state


def test_pictures_are_the_grids(run: RunDirectory, recipe: Recipe) -> None:
    shots = {int(image["data-step"]): image["src"] for image in page_of(run, recipe).all("img") if "data-step" in image}
    assert set(shots) == {0, 50, 100}
    content = base64.b64decode(shots[50].partition(",")[2])
    assert content == run.grid_file(50).read_bytes()


def test_a_damaged_grid_is_left_out(run: RunDirectory, recipe: Recipe) -> None:
    content = run.grid_file(50).read_bytes()
    run.grid_file(50).write_bytes(content[:-30])
    run.grid_file(50).with_name("step_of_mine.png").write_bytes(content)
    assert [one["data-step"] for one in page_of(run, recipe).all("img") if "data-step" in one] == ["0", "100"]


def test_large_pictures_are_made_smaller_and_many_grids_fewer(tmp_path: Path, recipe: Recipe) -> None:
    run = make_run(tmp_path / "run", recipe, [record(1)], list(range(0, 300, 10)))
    Image.effect_noise((3000, 300), 80).save(run.grid_file(290))
    shots = [image for image in page_of(run, recipe).all("img") if "data-step" in image]
    steps = sorted(int(shot["data-step"]) for shot in shots)
    assert len(steps) == MOST_GRIDS
    assert (steps[0], steps[-1]) == (0, 290)
    (large,) = [shot["src"] for shot in shots if shot["data-step"] == "290"]
    assert large.startswith("data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as picture:
        assert picture.width == 1100


def test_curves_are_drawn_and_can_be_read_out(run: RunDirectory, recipe: Recipe) -> None:
    page = page_of(run, recipe)
    figures = [figure for figure in page.all("figure") if "data-panel" in figure]
    numbers = json.loads("".join(page.words["script"]).partition('\n"use strict"')[0])
    assert len(figures) == len(numbers) == len(page.all("svg")) == len(panels(run.metrics(), ROLES))
    total = numbers[0]["lines"][0]["points"]
    assert [step for step, _ in total] == list(range(1, 101))
    assert total[4][1] == pytest.approx(run.metrics()[4]["reward"], rel=1e-4)


def test_held_out_rewards_stand_apart(run: RunDirectory, recipe: Recipe) -> None:
    html = write_report(run, recipe).read_text(encoding="utf-8")
    held = html[html.index("Held-out rewards") : html.index("The update")]
    assert "held out: judge" in held
    assert "nano-clip" not in held
    assert "Held-out rewards" not in write_report(run, _noted(run, recipe, rewards={})).read_text(encoding="utf-8")


def _noted(run: RunDirectory, recipe: Recipe, **notes: Any) -> Recipe:
    run.note(**notes)
    return recipe


def test_the_table_holds_first_against_last(tmp_path: Path, recipe: Recipe) -> None:
    records = [record(step, reward=float(step), entropy=5.0) for step in range(1, 21)]
    page = page_of(make_run(tmp_path / "run", recipe, records, []), recipe)
    cells = page.words["td"]
    at = cells.index("reward, weighted total")
    assert cells[at + 1 : at + 4] == ["1.5", "19.5", "+18"]
    assert "No errors: with fewer than 100" in page.text


def test_stage_times_add_up(run: RunDirectory, recipe: Recipe) -> None:
    cells = page_of(run, recipe).words["td"]
    at = cells.index("rollout")
    assert cells[at + 1 : at + 4] == ["1:40", "40%", "8.0"]  # 100 updates of 8 images in 100 s
    at = cells.index("grids, checkpoints, the rest")
    assert cells[at + 1 : at + 3] == ["0:50", "20%"]


def test_published_numbers_are_marked_as_the_papers(run: RunDirectory, recipe: Recipe) -> None:
    published = [
        {"table": "table 2", "step": 30, "measures": ["FID"], "base": [5.5], "trained": [4.25]},
        {"table": "another paper", "step": 0, "measures": ["IS"], "base": [88.0]},
    ]
    page = page_of(run, Recipe.model_validate(recipe.model_dump() | {"published": published}))
    assert "Reported by the paper, not measured here." in page.text
    at = page.words["td"].index("FID")
    assert page.words["td"][at + 1 : at + 6] == ["5.5", "4.25", "-1.25", "IS", "88"]
    assert {"table 2, after 30 updates", "another paper, before training"} <= set(page.words["h3"])
    assert "not measured here" not in page_of(run, recipe).text


def test_what_users_write_is_escaped(tmp_path: Path, recipe: Recipe) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    tree = recipe.model_dump() | {"description": evil}
    tree["policy"]["checkpoint"] = evil
    records = [record(step, rewards={evil: {"mean": 0.5}}) for step in range(1, 30)]
    chosen = Recipe.model_validate(tree)
    warnings = [{"step": 1, "guard": evil, "text": evil}]
    run = make_run(tmp_path / "run", chosen, records, [], warnings=warnings, versions={evil: evil}, device=evil)
    page = page_of(run, chosen)
    assert len(page.all("script")) == 2  # our own
    assert not [image for image in page.all("img") if "onerror" in image]
    assert evil in page.text


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path, recipe: Recipe, count: int) -> None:
    run = make_run(tmp_path / "run", recipe, [record(step) for step in range(1, count + 1)], [0][:count])
    assert f"training: {count} of 100 updates so far" in page_of(run, recipe, training=True).text


def test_a_run_of_an_earlier_version_has_a_page(tmp_path: Path, recipe: Recipe) -> None:
    known = ("step", "reward", "rewards", "kl", "seconds_rollout", "seconds_total")
    old = [{key: one[key] for key in known} for one in (record(step) for step in range(1, 30))]
    page = page_of(make_run(tmp_path / "run", recipe, old, [0]), recipe)
    assert "stopped after 29 of 100 updates" in page.text
    assert "KL to the base policy" in page.text


def test_long_curves_are_thinned_to_their_ends() -> None:
    records = [record(step) for step in range(1, 5001)]
    _, numbers = panel_svg(panels(records, ROLES)[0], [one["step"] for one in records])
    steps = [step for step, _ in numbers["lines"][0]["points"]]
    assert len(steps) <= MOST_POINTS + 1
    assert (steps[0], steps[-1]) == (1, 5000)


def test_numbers_show_two_digits_of_their_error() -> None:
    assert with_error(7.1234, 0.137) == "7.12 ± 0.14"
    assert with_error(0.00001764, 0.00000095, "+") == "(+1.764 ± 0.095)e-5"
    assert with_error(1234.0, 56.0) == "1234 ± 56"
    assert with_error(0.123456, None) == "0.1235"


def test_a_report_that_cannot_be_written_is_one_line(run: RunDirectory, recipe: Recipe) -> None:
    (run.root / "report.html").mkdir()
    said: list[str] = []
    run.tell = said.append
    refresh_report(run, recipe, training=True)
    refresh_report(run, recipe, training=True)
    assert len(said) == 1
    assert "report.html" in said[0]


@pytest.mark.usefixtures("pages")
def test_training_writes_it_at_every_checkpoint_and_at_the_end(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(policy_folder, steps=5, save_every=2, grid_every=2, weights={"red": 0.0})
    out, pages = tmp_path / "run", []
    rewards = FakeRewards()
    rewards.on_batch = lambda number: pages.append((out / "report.html").exists())
    run_training(recipe, out, rewards=rewards, console=Console(file=io.StringIO()))
    assert pages == [False, False, True, True, True]
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "finished: 5 updates" in page.text
    assert "held out: red" in page.text
    assert [image["data-step"] for image in page.all("img") if "data-step" in image] == ["0", "5", "2", "4"]
    notes = json.loads((out / "run.json").read_text())
    assert notes["rewards"] == {
        "bright": {"family": "conditional", "weight": 1.0},
        "red": {"family": "quality", "weight": 0.0},
    }
    assert {"argrpo", "torch", "transformers", "trl", "python"} <= notes["versions"].keys()


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("a server has gone"), ZeroDivisionError])
def test_however_a_run_ends_its_page_says_how_far_it_came(
    policy_folder: Path, tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    rewards = FakeRewards()

    def on_batch(number: int) -> None:
        if number == 3:
            raise error

    rewards.on_batch = on_batch
    recipe = tiny_recipe(policy_folder, steps=8)
    recipe = recipe.model_copy(update={"rewards": recipe.rewards.model_copy(update={"max_missing": 0.0})})
    with pytest.raises((SystemExit, UserError, ZeroDivisionError)):
        run_training(recipe, tmp_path / "run", rewards=rewards, console=Console(file=io.StringIO()))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert re.search("stopped after [23] of 8 updates", page)
    assert (tmp_path / "run" / "curves.png").exists()
