"""The page of results: every shape of file that the benchmarks write, one table each, honest about protocols."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from argrpo_cli.cli.app import run
from argrpo_cli.evals import drawbench as d
from argrpo_cli.evals.drawbench_images import Drawing
from argrpo_cli.evals.drawbench_prompts import PromptList
from argrpo_cli.evals.drawbench_scores import Scores
from argrpo_cli.evals.imagenet import ImagenetSettings, run_imagenet
from argrpo_cli.evals.report import read_results
from argrpo_cli.evals.report_page import html_page, section, write_report
from argrpo_cli.system.errors import UserError
from tests.evals.stub_inception import StubInception, install
from tests.training.tiny import save_tiny_policy

DRAWING = Drawing(per_prompt=2)


def drawbench(trained=(0.3, 0.5, 0.2, 0.4), base=(0.2, 0.2, 0.2, 0.2), drawing=DRAWING, name="mine"):
    scores = {"clip": Scores({name: list(trained), "base": list(base)}, weights="abc")}
    about = {key: {"policy": key, "weights": key, "image_size": 256} for key in (name, "base")}
    return d.summarise(scores, PromptList("list.txt", ("a dog.", "a cat.")), drawing, about, {})


def imagenet(n=50_000, reference="VIRTUAL_imagenet256_labeled.npz"):
    def measures(fid, error):
        return {"inception_score": {"value": 211.67, "error": 1.5}, "fid": {"value": fid, "error": error}}

    return {
        "benchmark": "imagenet",
        "policies": {"mine": measures(5.91, 0.05), "c2i-b-256": measures(5.46, None)},
        "difference": measures(0.45, 0.02),
        "paper": {"policy": "c2i-b-256", "base": {"fid": 5.46}, "AR-GRPO": {"fid": 5.91}},
        "protocol": {
            "measured": {"mine": {"images": n, "images_sha256": "a"}, "c2i-b-256": {"images": n, "images_sha256": "b"}},
            "reference": {"file": reference},
        },
        "warnings": ["recall of so few images is biased"],
    }


def geneval():
    def part(mean):
        score = {"mean": mean, "error": 0.01, "images": 4, "prompts": 1}
        return {"geneval-nano": {"single_object": score, "position": {**score, "error": None}, "overall": score}}

    return {
        "scores": {"mine": part(0.75), "base": part(0.5)},
        "totals": {"mine": {}, "base": {}},
        "difference": part(0.25),
        "settings": {"per_prompt": 4, "policies": ["x", "y"], "detector": {"name": "nano-detector"}},
    }


def nano():
    def measures(mean):
        return {
            "fid": {"mean": mean, "error": 0.1},
            "match": {"mean": 9.0, "error": float("nan")},
            "own": {"mean": 1.0},
        }

    return {
        "policies": {"mine": measures(3.0), "base": measures(4.0)},
        "difference": measures(-1.0),
        "real": {"fid": {"mean": 0.5, "error": 0.1}},
        "reward_weights": {"own": 1.0},
        "settings": {"n": 2016, "seed": 0},
    }


def entropy():
    common = {"split": "val", "cfg_scale": 2.0, "temperature": 1.0, "images": 10}
    rows = []
    for step, mean in ((0, 3.0), (20, 2.5)):
        for mode in ("conditional", "guided"):
            row = {"policy": f"step {step}", "step": step, "mode": mode, "mean": mean, "standard_error": 0.05}
            rows.append(row | common | ({"change": -0.5, "change_error": 0.01} if step else {}))
    return rows


@pytest.fixture
def write(tmp_path):
    def write_one(name, value):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in value) if isinstance(value, list) else json.dumps(value)
        path.write_text(lines)
        return path

    return write_one


def table_of(*paths):
    return section(read_results(list(paths)))


def cells(one):
    return {name: dict(zip(one.columns, texts, strict=True)) for name, texts, _ in one.lines}


def test_base_trained_difference_and_the_papers_two(write):
    one = table_of(write("summary.json", drawbench()))
    assert one.title == "DrawBench (table 4)"
    assert [(name, kind) for name, _, kind in one.lines] == [
        ("base", "measured"),
        ("mine", "measured"),
        ("mine − base", "difference"),
        ("LlamaGen (base) (paper)", "paper"),
        ("AR-GRPO (paper)", "paper"),
    ]
    rows = cells(one)
    assert rows["base"]["CLIP score"] == "0.200 ± 0.000"
    assert rows["mine"]["CLIP score"] == "0.350 ± 0.050"
    assert rows["mine − base"]["CLIP score"] == "+0.150 ± 0.050"
    assert rows["AR-GRPO (paper)"]["CLIP score"] == "0.274"
    assert {"images_per_prompt: 2", "sampling.cfg_scale: 2"} <= set(one.protocol)
    assert any("not DrawBench's list" in text for text in one.warnings)


def test_imagenet(write):
    one = table_of(write("summary.json", imagenet()))
    assert one.columns == ["IS ↑", "FID ↓"]
    rows = cells(one)
    assert rows["mine"] == {"IS ↑": "211.67 ± 1.50", "FID ↓": "5.910 ± 0.050"}
    assert rows["c2i-b-256"]["FID ↓"] == "5.460"
    assert rows["c2i-b-256, base (paper)"] == {"IS ↑": "", "FID ↓": "5.460"}
    assert "c2i-b-256, AR-GRPO (paper)" in rows
    assert one.warnings == ["recall of so few images is biased"]
    assert "images: 50000" in one.protocol and "sha256" not in "".join(one.protocol)


def test_geneval_in_the_papers_order_of_categories(write):
    one = table_of(write("summary.json", geneval()))
    assert one.title == "GenEval (table 3), geneval-nano"
    assert one.columns == ["position", "single object", "overall"]
    rows = cells(one)
    assert rows["mine"] == {"position": "0.750", "single object": "0.750 ± 0.010", "overall": "0.750 ± 0.010"}
    assert rows["AR-GRPO (paper)"] == {"position": "0.040", "single object": "0.791", "overall": "0.324"}
    assert any("of the 553 official prompts" in text for text in one.warnings)


def test_differences_of_two_files_say_which(write):
    first, second = write("a/s.json", drawbench()), write("b/s.json", drawbench(base=(0.1, 0.1, 0.1, 0.1)))
    told = [name for name, _, kind in table_of(first, second).lines if kind == "difference"]
    assert told == [f"mine − base ({first})", f"mine − base ({second})"]


def test_geneval_of_finished_pictures(write):
    """Which files they are is no conflict; that prompts are missing is told."""
    results = []
    for name, absent in (("ours", 543), ("theirs", 0)):
        value = geneval()
        value["scores"] = {name: value["scores"]["mine"]}
        value["settings"] = {"images": {"count": 40, "files": name * 16}, "detector": {"weights": "abc"}}
        results.append(write(f"{name}.json", {key: value[key] for key in ("scores", "totals", "settings")}
                             | {"prompts_absent": absent}))  # fmt: skip
    one = table_of(*results)
    assert not any("not measured alike" in text for text in one.warnings)
    assert any(text.startswith("543 of the 553 official prompts have no image") for text in one.warnings)
    assert "detector.weights: abc" in one.protocol


def test_nano_with_real_scenes_and_without_the_papers_rows(write):
    one = table_of(write("nano.json", nano()))
    assert [name for name, _, _ in one.lines] == ["base", "mine", "real scenes", "mine − base"]
    assert one.columns == ["rendering match, dB", "FID", "own"]
    assert cells(one)["mine"] == {"rendering match, dB": "9.000", "FID": "3.000 ± 0.100", "own": "1.000"}
    assert cells(one)["real scenes"]["own"] == "–"


def test_entropy_has_a_row_per_checkpoint(write):
    one = table_of(write("entropy.jsonl", entropy()))
    rows = cells(one)
    assert rows["step 20"] == {"conditional": "2.500 ± 0.050", "guided": "2.500 ± 0.050"}
    assert rows["step 20, change from step 0"]["guided"] == "-0.500 ± 0.010"
    assert "split: val" in one.protocol


def test_a_folder_is_searched_and_other_files_are_passed_over(write, tmp_path):
    write("run/drawbench/summary.json", drawbench())
    write("run/geneval/summary.json", geneval())
    write("run/entropy/entropy.jsonl", entropy())
    write("run/settings.json", {"per_prompt": 5})
    (tmp_path / "run" / "broken.json").write_text("{")
    (tmp_path / "run" / "list.json").write_text("[1]")
    titles = [result.title.split(" (")[0] for result in read_results([tmp_path / "run"])]
    assert sorted(titles) == ["DrawBench", "GenEval", "Policy entropy, nats per token"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no results in .*empty; expected the file of `argrpo eval nano --out`"):
        read_results([tmp_path / "empty"])


def test_files_of_one_benchmark_share_a_table(write):
    first, second = write("a/summary.json", drawbench()), write("b/summary.json", drawbench(name="other"))
    one = table_of(first, second)
    names = [name for name, _, _ in one.lines]
    assert names[:5] == ["base", "mine", "other", "mine − base", "other − base"]
    assert names[5:] == ["LlamaGen (base) (paper)", "AR-GRPO (paper)"]
    assert not any("not measured alike" in text for text in one.warnings)


def test_rows_that_were_measured_in_another_way_are_flagged(write):
    first = write("a/summary.json", drawbench())
    second = write("b/summary.json", drawbench(drawing=Drawing(per_prompt=2, seed=3, cfg_scale=4.0)))
    one = table_of(first, second)
    flagged = [text for text in one.warnings if "not measured alike" in text]
    assert (
        f"not measured alike: sampling.cfg_scale is 2 for base ({first}), mine ({first}); 4 for base ({second}), "
        in "\n".join(flagged)
    )
    assert any(": sampling.seed is 0 for" in text for text in flagged)
    assert "cfg_scale" not in "".join(one.protocol) and "sampling.temperature: 1" in one.protocol
    counts = table_of(write("c/s.json", imagenet()), write("e/s.json", imagenet(n=5000, reference="val.npz")))
    flagged = "\n".join(text for text in counts.warnings if "not measured alike" in text)
    assert "images is 50000 for" in flagged and "reference.file is VIRTUAL" in flagged


def test_files_of_some_columns_each_make_one_row_of_the_papers_numbers(write):
    parts = []
    for name in ("clip", "hpsv2"):
        scores = {name: Scores({"mine": [0.3, 0.5, 0.2, 0.4], "base": [0.2] * 4}, weights="abc")}
        about = {key: {"policy": key, "weights": key, "image_size": 256} for key in ("mine", "base")}
        result = d.summarise(scores, PromptList("list.txt", ("a dog.", "a cat.")), DRAWING, about, {})
        parts.append(write(f"{name}/summary.json", result))
    one = table_of(*parts)
    reported = [(name, texts) for name, texts, kind in one.lines if kind == "paper"]
    assert [name for name, _ in reported] == ["LlamaGen (base) (paper)", "AR-GRPO (paper)"]
    assert all(re.fullmatch(r"0\.\d{3}", text) for _, texts in reported for text in texts) and len(one.columns) == 2


def test_what_imagenet_writes_of_a_policy_and_of_a_folder_shares_a_table(tmp_path, monkeypatch):
    """Of a policy that is drawn, and of a folder that `argrpo sample` drew with other guidance."""
    install(StubInception(), monkeypatch.setattr)
    policy = str(save_tiny_policy(tmp_path / "tiny"))
    drawn = ["sample", "--policy", policy, "--device", "cpu"]
    assert run([*drawn, "--per-class", "3", "--seed", "7", "--out", str(tmp_path / "reference")]) == 0
    assert run([*drawn, "--per-class", "2", "--cfg-scale", "4", "--out", str(tmp_path / "folder")]) == 0
    options = {"reference": str(tmp_path / "reference"), "batch_size": 4, "device": "cpu"}
    run_imagenet([policy], None, tmp_path / "a", ImagenetSettings(n=8), **options)
    run_imagenet([], tmp_path / "folder", tmp_path / "b", **options)
    one = table_of(tmp_path / "a", tmp_path / "b")
    first, second = (name for name, _, kind in one.lines if kind == "measured")
    conflicts = [text for text in one.warnings if "not measured alike" in text]
    assert f"not measured alike: sampling.cfg_scale is 2 for {first}; 4 for {second}" in conflicts
    told = {text.split(":")[1].split()[0] for text in conflicts}
    assert told <= {"sampling.cfg_scale", "images", "images_per_class"}, "what a policy is, is no conflict"
    assert "reference.sha256: " in "".join(one.protocol) and "sampling.temperature: 1" in one.protocol
    assert f"of {second} alone: sampling.cfg_interval: -1" in one.protocol


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "is not a result that the report knows; expected the file of `argrpo eval nano --out`"),
        ([{"a": 1}], "is not a result that the report knows"),
        ({"benchmark": "drawbench", "policies": {"x": {"clip": {}}}}, "a part of it is missing or of another shape"),
        ({"scores": {"x": 3}, "totals": {}, "settings": {}}, "a part of it is missing or of another shape"),
    ],
)
def test_another_file_is_named(write, value, message):
    path = write("x.jsonl" if isinstance(value, list) else "x.json", value)
    with pytest.raises(UserError, match=message) as caught:
        read_results([path])
    assert str(path) in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.json: no such file"):
        read_results([tmp_path / "none.json"])


def test_markdown_has_as_many_cells_in_every_row(write, tmp_path):
    hostile = write("s.json", drawbench(name="a|b*<i>"))
    write_report(read_results([hostile]), tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 7 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert "a\\|b\\*&lt;i>" in text


class Checked(HTMLParser):
    """Collects the tags, and sees that they close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_one_escaped_file_light_and_dark(write):
    page = html_page([table_of(write("s.json", drawbench(name="<script>alert(1)</script>&")))])
    parser = Checked()
    parser.feed(page)
    assert not parser.open
    tags = [tag for tag, _ in parser.seen]
    assert "script" not in tags and "<script>alert(1)</script>&" in parser.text
    assert tags.count("tr") == 6 and not {"link", "img"} & set(tags)
    assert "prefers-color-scheme: dark" in page and "http" not in page
    assert [attributes.get("class") for tag, attributes in parser.seen if tag == "tr"][1:] == [
        *["measured"] * 2,
        "difference",
        *["paper"] * 2,
    ]


def test_the_command_writes_the_page_that_the_suffix_asks_for(write, tmp_path, capfd):
    path = str(write("summary.json", drawbench()))
    for name, start in (("r.md", "# Measured"), ("r.html", "<!doctype html>")):
        assert run(["eval", "report", path, "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_text().startswith(start)
    told = capfd.readouterr().out
    assert "1 table in" in told and "with 2 notes" in told
    assert run(["eval", "report", path, "--out", str(tmp_path / "r.pdf")]) == 2
    assert "give the page a name that ends in .md or .html" in capfd.readouterr().err
    assert not (tmp_path / "r.pdf").exists()
