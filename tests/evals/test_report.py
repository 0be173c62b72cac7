"""The page of results: every shape of file that the benchmarks write, one table each, honest about protocols."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from argrpo_cli.cli.app import run
from argrpo_cli.evals import benchmark
from argrpo_cli.evals.imagenet import ImageNet
from argrpo_cli.evals.tables import read_results, sections, write_report
from argrpo_cli.shapes import Column, Result, Value
from argrpo_cli.system.errors import UserError
from tests.evals.stub_inception import StubInception, install
from tests.training.tiny import save_tiny_policy


def measured(*names, **protocol):
    about = {name: {"path": name, "weights": name} for name in names}
    return {"sampling": {"cfg_scale": 2.0, "temperature": 1.0, "seed": 0}, "measured": about} | protocol


def drawbench(trained=0.35, base=0.2, name="mine", key="clip", number=0.274, **protocol):
    """A policy and its baseline in one column of table 4."""
    labels = {"clip": "CLIP score", "hpsv2": "HPSv2"}
    return Result(
        "drawbench",
        {key: Column(labels[key], "cosine", "higher")},
        {name: {key: Value(trained, 0.05, 4)}, "base": {key: Value(base, 0.0, 4)}},
        {key: Value(trained - base, 0.05, 4)},
        {"LlamaGen (base)": {key: 0.245}, "AR-GRPO": {key: number}},
        measured(name, "base", **protocol),
        ["images per prompt 2 (paper 5)"],
        ["the prompts of list.txt are not DrawBench's list"],
    )


def imagenet(n=50_000, reference="VIRTUAL_imagenet256_labeled.npz"):
    def row(fid, error):
        return {"inception_score": Value(211.67, 1.5, n), "fid": Value(fid, error, n)}

    return Result(
        "imagenet",
        {"inception_score": Column("IS", "", "higher", 2), "fid": Column("FID", "", "lower", 2)},
        {"mine": row(5.91, 0.05), "c2i-b-256": row(5.46, None)},
        row(0.45, 0.02),
        {"LlamaGen (base)": {"fid": 5.46}, "AR-GRPO": {"fid": 5.91}},
        measured("mine", "c2i-b-256", reference={"file": reference}),
        warnings=["recall of so few images is biased"],
    )


def geneval():
    """Two sets of prompts."""
    columns, row = {}, {}
    for part in ("geneval", "all"):
        for tag, error in (("position", None), ("overall", 0.01)):
            columns[f"{part}/{tag}"] = Column(tag, "", "higher", 1, True, part)
            row[f"{part}/{tag}"] = Value(0.75, error, 4)
    paper = {"AR-GRPO": {"geneval/position": 0.04, "geneval/overall": 0.324}}
    return Result("geneval", columns, {"mine": row}, paper=paper, protocol=measured("mine"))


def nano():
    columns = {"fid": Column("FID", "", "lower"), "match": Column("rendering match, dB"), "own": Column("own")}
    rows = {
        "mine": {"fid": Value(3.0, 0.1), "match": Value(9.0, None), "own": Value(1.0)},
        "base": {"fid": Value(4.0, 0.1), "match": Value(9.0, None), "own": Value(1.0)},
        "real scenes": {"fid": Value(0.5, 0.1)},
    }
    return Result("nano", columns, rows, {"fid": Value(-1.0, 0.1)}, protocol=measured("mine", "base"))


@pytest.fixture
def write(tmp_path):
    def write_one(name, value):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        value.save(path) if isinstance(value, Result) else path.write_text(json.dumps(value))
        return path

    return write_one


def table_of(*paths):
    (one,) = sections(read_results(list(paths)))
    return one


def cells(one):
    return {name: dict(zip(one.columns, texts, strict=True)) for name, texts, _ in one.lines}


def test_base_trained_difference_and_the_papers_two(write):
    one = table_of(write("summary.json", drawbench()))
    assert one.title == "DrawBench (table 4)" and one.columns == ["CLIP score ↑"]
    assert [(name, texts[0], kind) for name, texts, kind in one.lines] == [
        ("base", "0.200 ± 0.000", "measured"),
        ("mine", "0.350 ± 0.050", "measured"),
        ("mine − base", "+0.150 ± 0.050", "difference"),
        ("LlamaGen (base) (paper)", "0.245", "paper"),
        ("AR-GRPO (paper)", "0.274", "paper"),
    ]
    assert "sampling.cfg_scale: 2" in one.protocol and "images: 4" in one.protocol
    assert one.warnings == [
        "the prompts of list.txt are not DrawBench's list",
        "not as in the paper: images per prompt 2 (paper 5)",
    ]


def test_each_column_has_its_digits_and_what_was_not_measured_a_dash(write):
    one = table_of(write("summary.json", imagenet()))
    assert one.columns == ["IS ↑", "FID ↓"]
    rows = cells(one)
    assert rows["mine"] == {"IS ↑": "211.67 ± 1.50", "FID ↓": "5.91 ± 0.05"}
    assert rows["c2i-b-256"]["FID ↓"] == "5.46"
    assert rows["LlamaGen (base) (paper)"] == {"IS ↑": "", "FID ↓": "5.46"}
    assert "images: 50000" in one.protocol and "weights" not in "".join(one.protocol)


def test_each_group_of_columns_is_a_table(write):
    one, other = sections(read_results([write("summary.json", geneval())]))
    assert one.title == "GenEval (table 3), geneval" and other.title == "GenEval (table 3), all"
    assert cells(one)["mine"] == {"position ↑": "75.0 %", "overall ↑": "75.0 ± 1.0 %"}
    assert cells(one)["AR-GRPO (paper)"] == {"position ↑": "4.0 %", "overall ↑": "32.4 %"}
    assert [kind for _, _, kind in other.lines] == ["measured"], "the paper has no such numbers"


def test_differences_of_two_files_say_which(write):
    first, second = write("a/s.json", drawbench()), write("b/s.json", drawbench(base=0.1))
    names = [name for name, _, kind in table_of(first, second).lines if kind == "difference"]
    assert names == [f"mine − base ({first})", f"mine − base ({second})"]


def test_nano_with_real_scenes_and_without_the_papers_rows(write):
    one = table_of(write("nano.json", nano()))
    assert [name for name, _, _ in one.lines] == ["base", "mine", "real scenes", "mine − base"]
    assert cells(one)["mine"] == {"FID ↓": "3.000 ± 0.100", "rendering match, dB": "9.000", "own": "1.000"}
    assert cells(one)["real scenes"]["own"] == "–"


def test_a_folder_is_searched_and_other_files_are_passed_over(write, tmp_path):
    write("run/drawbench/summary.json", drawbench())
    write("run/geneval/summary.json", geneval())
    write("run/settings.json", {"per_prompt": 5})
    (tmp_path / "run" / "broken.json").write_text("{")
    (tmp_path / "run" / "list.json").write_text("[1]")
    assert [one.benchmark for one in read_results([tmp_path / "run"]).values()] == ["drawbench", "geneval"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no results in .*empty; expected what `argrpo eval`"):
        read_results([tmp_path / "empty"])
    write("earlier/summary.json", {"scores": {}})
    with pytest.raises(UserError, match="earlier version"):
        read_results([tmp_path / "earlier"])


def test_files_of_one_benchmark_share_a_table(write):
    first, second = write("a/summary.json", drawbench()), write("b/summary.json", drawbench(name="other"))
    one = table_of(first, second)
    names = [name for name, _, _ in one.lines]
    assert names[:5] == ["base", "mine", "other", "mine − base", "other − base"]
    assert names[5:] == ["LlamaGen (base) (paper)", "AR-GRPO (paper)"]
    assert not any("not measured alike" in text for text in one.warnings)


def test_rows_that_were_measured_in_another_way_are_flagged(write):
    first = write("a/summary.json", drawbench())
    other = {"sampling": {"cfg_scale": 4.0, "temperature": 1.0, "seed": 3}}
    second = write("b/summary.json", drawbench(**other))
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
    parts = [write(f"{key}/summary.json", drawbench(key=key)) for key in ("clip", "hpsv2")]
    one = table_of(*parts)
    reported = [(name, texts) for name, texts, kind in one.lines if kind == "paper"]
    assert [name for name, _ in reported] == ["LlamaGen (base) (paper)", "AR-GRPO (paper)"]
    assert all(re.fullmatch(r"0\.\d{3}", text) for _, texts in reported for text in texts) and len(one.columns) == 2


def test_what_some_rows_alone_tell_is_told_of_them(write):
    extra = drawbench(name="other", reference="adm")
    one = table_of(write("a/summary.json", drawbench(base=0.1)), write("b/summary.json", extra))
    (alone,) = [text for text in one.protocol if text.startswith("of ")]
    assert re.fullmatch(r"of base \(.*b/summary.json\), other alone: reference: adm", alone)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "is no result of argrpo"),
        ({"benchmark": "drawbench", "policies": {"x": {"clip": {}}}}, "a result of an earlier version; measure again"),
        ({"format": 2, "benchmark": "drawbench", "columns": {}, "rows": 3}, "is a damaged result"),
    ],
)
def test_another_file_is_named(write, value, message):
    path = write("x.json", value)
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


def test_html_is_one_escaped_file_light_and_dark(write, tmp_path):
    results = read_results([write("s.json", drawbench(name="<script>alert(1)</script>&"))])
    write_report(results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
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


def test_what_imagenet_writes_of_a_policy_and_of_a_folder_shares_a_table(tmp_path, monkeypatch):
    """Of a policy that is drawn, and of a folder that `argrpo sample` drew with other guidance."""
    install(StubInception(), monkeypatch.setattr)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    policy, reference = str(save_tiny_policy(tmp_path / "tiny")), str(tmp_path / "reference")
    drawn = ["sample", "--policy", policy, "--device", "cpu"]
    assert run([*drawn, "--per-class", "3", "--seed", "7", "--out", reference]) == 0
    assert run([*drawn, "--per-class", "2", "--cfg-scale", "4", "--out", str(tmp_path / "folder")]) == 0
    small = {"batch_size": 4, "device": "cpu"}
    benchmark.run(ImageNet(reference=reference), [policy], tmp_path / "a", n=8, **small)
    benchmark.run(ImageNet(reference=reference), [], tmp_path / "b", images=tmp_path / "folder", **small)
    one = table_of(tmp_path / "a", tmp_path / "b")
    first, second = (name for name, _, kind in one.lines if kind == "measured")
    conflicts = [text for text in one.warnings if "not measured alike" in text]
    assert conflicts == [f"not measured alike: sampling.cfg_scale is 2 for {first}; 4 for {second}"]
    assert "reference.sha256: " in "".join(one.protocol) and "sampling.temperature: 1" in one.protocol
