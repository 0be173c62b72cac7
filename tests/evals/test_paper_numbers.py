"""The paper's numbers that stand beside our own, against a copy of its tables; and where a run departs from it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from argrpo_cli.evals.geneval import GenEvalSettings
from argrpo_cli.evals.report import read_results
from argrpo_cli.evals.report_page import markdown, section
from argrpo_cli.paper import numbers as p
from tests.evals.test_report import geneval

TABLES = yaml.safe_load((Path(__file__).parents[1] / "data" / "paper_tables.yaml").read_text())
MODELS = {"c2i-b-256": "c2i_b256", "c2i-b-384": "c2i_b384", "c2i-l-384": "c2i_l384", "c2i-xl-384": "c2i_xl384"}
BEFORE_AND_AFTER = {2: TABLES["table 2"]["c2i_b256"]} | {n: TABLES[f"table {n}"]["t2i_xl256"] for n in (3, 4)}


def ablation(number: int, after: int) -> dict[str, list[float]]:
    """A table of the rewards' weights: the base, A to C, and D, which is the training of table `after`."""
    rows = {name[-1].upper(): row for name, row in TABLES[f"table {number}"].items()}
    base = BEFORE_AND_AFTER[after]["base"]
    assert all(row["base"] == base for row in rows.values())
    return (
        {"base": base}
        | {name: row["trained"] for name, row in rows.items()}
        | {"D": BEFORE_AND_AFTER[after]["trained"]}
    )


def test_every_number_is_the_papers():
    assert {MODELS[name]: rows for name, rows in p.TABLE_2_ALL.items()} == TABLES["table 2"]
    for number, found in ((2, p.TABLE_2), (3, p.TABLE_3), (4, p.TABLE_4)):
        rows = BEFORE_AND_AFTER[number]
        assert found == {"LlamaGen (base)": rows["base"], "AR-GRPO": rows["trained"]}
    without = TABLES["table 5"]["c2i_b256_no_kl"]
    rows = BEFORE_AND_AFTER[2]
    assert {"base": without["base"], "without KL": without["trained"], "with KL": rows["trained"]} == p.TABLE_5
    assert without["base"] == rows["base"]
    for found, number, after in ((p.TABLE_6, 6, 2), (p.TABLE_7, 7, 3), (p.TABLE_8, 8, 4)):
        assert found == ablation(number, after)


def test_no_table_is_left_unchecked():
    tables = {name for name in vars(p) if name.startswith("TABLE_")}
    assert tables == {f"TABLE_{number}" for number in range(2, 9)} | {"TABLE_2_ALL", "TABLE_3_COLUMNS"}
    assert {f"table {number}" for number in range(2, 9)} == set(TABLES)


def test_genevals_columns_are_in_the_papers_order():
    """GenEval's overall score is the mean of its six categories."""
    columns = ("position", "colors", "color_attr", "counting", "single_object", "two_object", "overall")
    assert columns == p.TABLE_3_COLUMNS
    for row in (*p.TABLE_3.values(), *p.TABLE_7.values()):
        assert abs(sum(row[:-1]) / 6 - row[-1]) < 0.0011


def test_the_page_says_where_a_geneval_departs_from_the_papers(tmp_path):
    departures = GenEvalSettings(per_prompt=2, temperature=0.5).departures
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(geneval() | {"differs_from_paper": departures}))
    one = section(read_results([path]))
    assert len(departures) == 2 and "temperature 0.5 (paper 1)" in departures
    assert [text for text in one.warnings if "paper" in text][:2] == [
        f"not as in the paper: {text}" for text in departures
    ]
    assert "- **Note:** not as in the paper: temperature 0.5 (paper 1)\n" in markdown([one])
