"""The paper's numbers that stand beside our own."""

from __future__ import annotations

from argrpo_cli import paper_numbers as p


def test_genevals_columns_are_in_the_papers_order():
    """GenEval's overall score is the mean of its six categories."""
    for row in (*p.before_and_after(3).values(), *p.ablation(7).values()):
        *tags, overall = row.values()
        assert list(row)[-1] == "overall" and abs(sum(tags) / 6 - overall) < 0.0011


def test_the_rows_of_a_policy_are_those_of_its_own_training():
    rows = p.before_and_after(2, "c2i-l-384")
    assert (rows["LlamaGen (base)"]["fid"], rows["AR-GRPO"]["fid"]) == (3.08, 4.24)
    assert p.before_and_after(2, "nano-c2i") == {} == p.before_and_after(2), "there are four of them"
    assert p.before_and_after(4)["AR-GRPO"]["imagereward"] == -0.712


def test_an_ablation_stands_between_the_base_and_all_rewards():
    for number, after in ((6, p.table(2)["c2i_b256"]), (7, p.table(3)["t2i_xl256"]), (8, p.table(4)["t2i_xl256"])):
        rows = p.ablation(number)
        assert list(rows) == ["base", "A", "B", "C", "D"]
        assert (rows["base"], rows["D"]) == (after["base"], after["trained"])
        assert all(one["base"] == after["base"] for one in p.table(number).values())
