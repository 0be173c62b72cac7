"""`argrpo eval drawbench`: table 4 of the paper, seven reward models over 200 prompts with five pictures each.

The pictures of two policies have the same prompts and seeds. Everything lies in one folder, written as it comes, so
that an interrupted evaluation goes on where it stopped; a column can be added later to the same pictures:

    settings.json                      what is drawn; a folder is not used for two things
    POLICY/images/                     the pictures and metadata.jsonl, as `argrpo score` reads them
    POLICY/scores/REWARD.jsonl         the raw score of each picture
    summary.json                       means, errors, differences, the paper's numbers and the protocol

Standard errors are clustered by prompt (`clusters.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argrpo_cli import __version__
from argrpo_cli.clusters import clustered_mean
from argrpo_cli.evals.drawbench_images import Drawing, draw
from argrpo_cli.evals.drawbench_prompts import PromptList
from argrpo_cli.evals.drawbench_scores import TABLE_4, Scores, choices, column_of, score_reward
from argrpo_cli.evals.folders import check_claim, claim, policy_folders
from argrpo_cli.images import Said, find_items
from argrpo_cli.paper import numbers as paper_numbers
from argrpo_cli.policy import Policy, load_policy
from argrpo_cli.rewards import REWARDS, check_options, check_reward
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import read_json, write_json
from argrpo_cli.system.processes import join_team

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "summary.json"
PAPER_SIZE = 256  # pixels, of LlamaGen-XL in table 4
MOST_MISSING = 0.05  # share of pictures without a score from which a mean would be one of other prompts
LIBRARIES = ("torch", "transformers", "open_clip_torch", "pyiqa")  # that the rewards compute with


def run_drawbench(
    policies: Sequence[str],
    prompts: PromptList,
    out: Path,
    rewards: Sequence[str] = tuple(TABLE_4),
    drawing: Drawing = Drawing(),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> dict[str, Any] | None:
    """Draw, score and average; one policy, or two of which the second is the baseline.

    Several processes draw batches, and then score columns, in turn.

    Args:
        rewards: names of `argrpo_cli.rewards`; those of table 4 come in its units, others raw.
        options: name of a reward to options of its own.

    Returns:
        What summary.json holds: `benchmark`, `policies` {name: {reward: {value, error, images, prompts, missing}}},
        for two policies `difference` {reward: {value, error, images, prompts}} (first minus second, picture by
        picture), `columns` {reward: {label, unit}}, `paper` {row: {reward: number}}, `protocol` and `warnings`. A value
        is None where a reward could not be measured; a warning says why. None in all of several processes but the
        first.

    Raises:
        UserError: no such policy or reward, one that reads no captions, an `out` used for something else, or nothing
            could be measured.
    """
    names = policy_folders(policies)
    if not rewards:
        raise UserError("--columns is empty; name at least one reward")
    for reward in rewards:
        check_reward(reward)
        if rewards.count(reward) > 1:
            raise UserError(f"--columns names {reward!r} twice")
        if reward in REWARDS:
            check_options(reward, (options or {}).get(reward, {}))
    drawing.check(len(prompts.prompts))
    team = join_team(device)
    team.lead(lambda: check_claim(out))
    loaded = team.together(lambda: _load(dict(zip(names, policies, strict=True)), prompts, drawing.dtype, team.device))
    about = {
        name: {"policy": path, "weights": loaded[name].fingerprint(), "image_size": loaded[name].image_size}
        for name, path in zip(names, policies, strict=True)
    }
    drawn = {**asdict(drawing), "prompts": prompts.sha256, "weights": [one["weights"] for one in about.values()]}
    kept_batch_size = team.from_lead(lambda: claim(out, drawn, batch_size))
    for name in names:  # popped, since the networks of the rewards need the room
        folder = out / name / "images"
        draw(loaded.pop(name), about[name]["policy"], prompts.prompts, drawing, folder, kept_batch_size, team)
    mine = rewards[team.index :: team.count]
    own_scores = team.together(lambda: _score(names, out, mine, options or {}, batch_size, team.device))
    known = {reward: one for part in team.exchange(own_scores) for reward, one in part.items()}
    result = summarise({reward: known[reward] for reward in rewards}, prompts, drawing, about, options or {})

    def finish() -> dict[str, Any]:
        whole = _with_earlier(result, out / SUMMARY)
        if all(value["value"] is None for own in result["policies"].values() for value in own.values()):
            why = "; ".join(text for text in result["warnings"] if " has no score for " in text)
            raise UserError(f"nothing could be measured: {why}; the pictures are kept in {out}")
        write_json(out / SUMMARY, whole)
        return whole

    return team.lead(finish)


def _with_earlier(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result, and before its columns those that an earlier call measured of the same pictures."""
    held = read_json(path) if path.is_file() else {}
    protocol = held.get("protocol", {})
    same = ("prompts", "images_per_prompt", "sampling", "policies", "versions")
    if any(protocol.get(key) != result["protocol"][key] for key in same):
        return result
    whole = {**result, "columns": {**held["columns"], **result["columns"]}}
    if "difference" in result:
        whole["difference"] = {**held["difference"], **result["difference"]}
    for key in ("policies", "paper"):
        whole[key] = {row: {**held[key][row], **cells} for row, cells in result[key].items()}
    rewards = {**protocol["rewards"], **result["protocol"]["rewards"]}
    whole["protocol"] = {**result["protocol"], "rewards": rewards}
    asked = tuple(f"{reward} " for reward in result["columns"])
    kept = [text for text in held["warnings"] if not text.startswith(asked) and text not in result["warnings"]]
    return {**whole, "warnings": [*result["warnings"], *kept]}


def _load(policies: Mapping[str, str], prompts: PromptList, dtype: str, device: str) -> dict[str, Policy]:
    """Name to policy, each able to read every prompt."""
    loaded = {name: load_policy(path, device, dtype) for name, path in policies.items()}
    for name, policy in loaded.items():
        if policy.text_encoder is None:
            raise UserError(
                f"{policies[name]} draws classes, and DrawBench asks with captions; give a policy such as t2i-xl-256"
            )
        policy.conditions(list(prompts.prompts))  # which it refuses where it cannot read one
    return loaded


def _score(
    names: Sequence[str],
    out: Path,
    rewards: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    device: str,
) -> dict[str, Scores]:
    pictures = {name: find_items([out / name / "images"], Said()).items for name in names}
    folders = {name: out / name / "scores" for name in names}
    return {
        reward: score_reward(reward, pictures, folders, options.get(reward, {}), batch_size, device)
        for reward in rewards
    }


def summarise(
    scores: Mapping[str, Scores],
    prompts: PromptList,
    drawing: Drawing,
    about: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What `run_drawbench` returns, of raw scores in the order of the pictures.

    Args:
        about: policy to its path, hash of weights and image size.
    """
    sizes = [one["image_size"] for one in about.values()]
    warnings = [text for text in (prompts.remark(), *_departures(drawing, sizes, options)) if text]
    names = list(about)
    policies: dict[str, dict[str, Any]] = {name: {} for name in names}
    difference: dict[str, Any] = {}
    for reward, own in scores.items():
        usable = {}
        for name in names:
            values = own.values[name]
            missing = sum(value is None for value in values)
            if missing:
                why = own.fault or own.missing or "it said no more"
                warnings.append(f"{reward} has no score for {missing} of {len(values)} pictures of {name}: {why}")
            enough = missing == 0 or (not own.fault and missing <= MOST_MISSING * len(values))
            usable[name] = _scaled(values, reward) if enough else [None] * len(values)
            policies[name][reward] = {**prompt_mean(usable[name], drawing.per_prompt), "missing": missing}
        if len(names) == 2:
            pairs = zip(*usable.values(), strict=True)
            paired = [None if None in pair else pair[0] - pair[1] for pair in pairs]
            difference[reward] = prompt_mean(paired, drawing.per_prompt)
            both = sum(one is not None for one in paired)
            if 0 < both < len(paired):
                warnings.append(
                    f"{reward} of the difference: of the {both} of {len(paired)} pairs that have both scores"
                )
    result: dict[str, Any] = {"benchmark": "drawbench", "policies": policies}
    if difference:
        result["difference"] = difference
    result["columns"] = {
        reward: {"label": column_of(reward).label, "unit": column_of(reward).unit} for reward in scores
    }
    places = {reward: place for place, reward in enumerate(TABLE_4)}
    result["paper"] = {
        row: {reward: numbers[places[reward]] for reward in scores if reward in places}
        for row, numbers in paper_numbers.TABLE_4.items()
    }
    result["protocol"] = {
        "prompts": {
            "source": prompts.source,
            "count": len(prompts.prompts),
            "sha256": prompts.sha256,
            "of_drawbench": prompts.matching,
        },
        "images_per_prompt": drawing.per_prompt,
        "sampling": {
            "cfg_scale": drawing.cfg_scale,
            "temperature": drawing.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "dtype": drawing.dtype,
            "seed": drawing.seed,
            "first_image_seed": drawing.image_seed(0),
        },
        "policies": {name: dict(one) for name, one in about.items()},
        "rewards": {
            reward: {"weights": own.weights, "options": dict(options.get(reward, {}))} for reward, own in scores.items()
        },
        "errors": "standard errors clustered by prompt; differences paired picture by picture",
        "versions": {"argrpo": __version__, **_versions()},
    }
    result["warnings"] = warnings
    return result


def prompt_mean(values: Sequence[float | None], per_prompt: int) -> dict[str, Any]:
    """Mean of the values that are there and its standard error, `per_prompt` in a row being of one prompt.

    Returns:
        `value` and `error` (None where there is no value, or a single prompt), `images` and `prompts` counted.
    """
    groups = [
        [value for value in values[start : start + per_prompt] if value is not None]
        for start in range(0, len(values), per_prompt)
    ]
    groups = [group for group in groups if group]
    if not groups:
        return {"value": None, "error": None, "images": 0, "prompts": 0}
    mean, error = clustered_mean(groups)
    told = None if math.isnan(error) else error
    return {"value": mean, "error": told, "images": sum(map(len, groups)), "prompts": len(groups)}


def _scaled(values: Sequence[float | None], reward: str) -> list[float | None]:
    divisor = column_of(reward).divisor
    return [None if value is None else value / divisor for value in values]


def _departures(drawing: Drawing, sizes: Sequence[int], options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where drawing and scoring are not the paper's."""
    paper = Drawing()
    told = {"per_prompt": "images per prompt", "cfg_scale": "guidance", "temperature": "temperature"}
    found = [
        f"{label} {getattr(drawing, key):g}, the paper has {getattr(paper, key):g}"
        for key, label in told.items()
        if getattr(drawing, key) != getattr(paper, key)
    ]
    found += [
        f"pictures of {size} pixels, the paper has {PAPER_SIZE}" for size in dict.fromkeys(sizes) if size != PAPER_SIZE
    ]
    found += [
        f"{reward} with {key}={value}; the paper's column has it as it comes"
        for reward, own in options.items()
        if reward in TABLE_4
        for key, value in choices(own).items()
    ]
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(result: dict[str, Any]) -> Table:
    """The result as a Rich table: baseline, policy, paired difference, and table 4 of the paper."""
    from rich.table import Table

    protocol = result["protocol"]
    prompts, sampling = protocol["prompts"], protocol["sampling"]
    paper = result["paper"] if any(result["paper"].values()) else {}
    out = Table(
        title=f"DrawBench, {prompts['count']} prompts of {prompts['source']}, {protocol['images_per_prompt']} images "
        f"each, cfg {sampling['cfg_scale']:g}, seed {sampling['seed']}; ± standard error",
        caption="errors are clustered by prompt; in grey what the paper reports, of LlamaGen-XL at 256 pixels"
        if paper
        else "errors are clustered by prompt",
    )
    names = list(result["policies"])[::-1]  # the baseline first
    out.add_column("reward")
    for name in [*names, *(["difference"] if "difference" in result else [])]:
        out.add_column(name, justify="right")
    for row in paper:
        out.add_column(row, justify="right", style="dim")
    for reward, column in result["columns"].items():
        cells = [_cell(result["policies"][name][reward]) for name in names]
        if "difference" in result:
            cells.append(_cell(result["difference"][reward], "+"))
        reported = [f"{numbers[reward]:.3f}" if reward in numbers else "" for numbers in paper.values()]
        unit = "" if column["unit"] == "raw" else f", {column['unit']}"
        out.add_row(f"{column['label']}{unit}", *cells, *reported)
    return out


def _cell(value: Mapping[str, Any], sign: str = "") -> str:
    if value["value"] is None:
        return "–"
    error = "" if value["error"] is None else f" ± {value['error']:.3f}"
    return f"{value['value']:{sign}.3f}{error}"
