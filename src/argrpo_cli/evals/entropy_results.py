"""What `argrpo entropy` is asked, and what it tells: a table, numbers for other tools, the curve (the paper's figure 4)
and bars by size and resolution (figure 3). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from argrpo_cli.evals.benchmark import SUMMARY
from argrpo_cli.images import ImageSet
from argrpo_cli.policy.folder import checkpoint_folders
from argrpo_cli.runs.run import RunDirectory
from argrpo_cli.shapes import Column, Result, Sampling, Value, shared_settings
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import check_writable, make_dir, read_jsonl, save_figure, write_jsonl

if TYPE_CHECKING:
    from rich.table import Table

MODES = ("conditional", "guided")
NORMAL_95 = 1.959964  # half-width of a 95 % interval in standard errors
NUMBERS, CURVE, BARS = "entropy.jsonl", "curve.png", "bars.png"
JOURNAL = ".journal"  # what was measured, chunk by chunk
COLORS = {"conditional": "tab:blue", "guided": "tab:orange"}
SHADES = ("#9aa5b1", "#d1495b", "#edae49", "#30638e", "#6a994e")  # the first of a family, and those compared with it
LONGEST_NAME = 24


class EntropyRow(TypedDict):
    """What is read again of a line of `NUMBERS`."""

    images: int


@dataclass(frozen=True)
class NamedPolicy:
    """A policy to measure: how to open it, what to call it, and its step when it is a checkpoint of a run."""

    path: str
    name: str
    step: int | None = None


def subjects_of_run(run: Path) -> list[NamedPolicy]:
    """The base policy of a run, its checkpoints in order, and the trained policy where the last checkpoint is older.

    Raises:
        UserError: no run directory, one without checkpoints and trained policy, or its base policy is gone.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is no run directory: it has no run.json")
    notes = RunDirectory(run).notes()
    base = notes.get("base_policy")
    if not base or not Path(base).is_dir():
        raise UserError(f"the base policy of {run} is gone: {base}; measure its checkpoints with --policy")
    folders = checkpoint_folders(run)
    finished = (notes.get("finished") or {}).get("step")
    if finished is not None and finished not in folders and (run / "policy").is_dir():
        folders[finished] = run / "policy"
    if not folders:
        raise UserError(f"{run} has no checkpoints yet; train longer, or lower logging.save_every")
    return [
        NamedPolicy(base, "base", 0),
        *(NamedPolicy(str(path), f"step {step}", step) for step, path in folders.items()),
    ]


@dataclass(frozen=True)
class Question:
    """What the entropy is measured on: scenes of the nano world, other pictures, or samples.

    Attributes:
        prompts: a bundled set or a file of captions to sample; None for held-out images, teacher-forced.
        limit: at most so many.
        seed: of the samples.
        data: real pictures in the place of the scenes, `limit` of them.
    """

    prompts: str | None = None
    limit: int | None = None
    seed: int = 0
    data: ImageSet | None = None

    def about(self) -> dict[str, str | None]:
        """What rows say of it; results on other images go elsewhere."""
        split, data = None if self.prompts else "val", str(self.data.path) if self.data else None
        return {"split": split, "asked": self.prompts, "data": data}


def claim(out: Path, question: Question) -> None:
    """Refuse a folder that cannot be written, has other things in it, or holds the entropy on other images.

    Raises:
        UserError: what is in the way.
    """
    check_writable(out)
    if not out.is_dir():
        return
    others = [
        path.name for path in out.iterdir() if path.name not in (NUMBERS, CURVE, BARS, SUMMARY) and path.name[0] != "."
    ]
    if others:
        raise UserError(f"{out} is not empty (there is {min(others)}); choose another --out")
    rows = read_jsonl(out / NUMBERS, EntropyRow) if (out / NUMBERS).is_file() else []
    if rows and any(rows[0].get(key) != value for key, value in question.about().items()):
        raise UserError(f"{out} holds the entropy on other images; choose another --out")
    if rows and question.limit is not None and question.limit < rows[0]["images"]:
        more = f"the entropy on {rows[0]['images']} images, more than --n {question.limit}"
        raise UserError(f"{out} holds {more}; choose another --out")


def write_results(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """The numbers and the pictures in the folder `out`; the paths of the pictures."""
    write_jsonl(make_dir(out) / NUMBERS, rows)
    result_of(rows).save(out / SUMMARY)
    draw_curve(rows, out / CURVE)
    if not has_bars(rows):
        (out / BARS).unlink(missing_ok=True)  # of an earlier call with more policies
        return [out / CURVE]
    draw_bars(rows, out / BARS)
    return [out / CURVE, out / BARS]


def result_of(rows: Sequence[dict[str, Any]]) -> Result:
    """The means as every benchmark tells them. Of two policies the first is the baseline, as in `measure`."""
    cells: dict[str, dict[str, Value]] = {}
    changes: dict[str, dict[str, Value]] = {}
    measured: dict[str, dict[str, Any]] = {}
    for row in rows:
        name, mode = row["policy"], row["mode"]
        cells.setdefault(name, {})[mode] = Value(row["mean"], row["standard_error"], row["images"])
        if "change" in row:
            changes.setdefault(name, {})[mode] = Value(row["change"], row["change_error"], row["images"])
        known = ("path", "step", "weights", "base", "parameters", "image_size", "against")
        measured[name] = {key: row[key] for key in known if row.get(key) is not None}
    drawing = (*asdict(Sampling()), "seed")
    alike, others = shared_settings([{key: row[key] for key in drawing if key in row} for row in rows])
    for row, other in zip(rows, others, strict=True):
        measured[row["policy"]] |= {"sampling": other} if other else {}
    first, pair = rows[0], len(cells) == 2
    shared = ("split", "prompts", "asked", "data", "labels", "preprocessing", "tokenizer", "versions")
    several = {name: {mode: asdict(one) for mode, one in own.items()} for name, own in changes.items()}
    return Result(
        benchmark="entropy",
        columns={mode: Column(mode, "nats/token", digits=4) for mode in MODES},
        rows=dict(reversed(cells.items())) if pair else cells,
        difference=changes[list(cells)[1]] if pair else {},
        protocol={
            "sampling": alike,
            "measured": measured,
            **{key: first[key] for key in shared if first.get(key) is not None},
            **({} if pair or not several else {"changes": several}),
            "errors": "over images, whose tokens are not independent; changes are paired image by image",
        },
    )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A Rich table, one line per policy and mode."""
    from rich.table import Table

    first = rows[0]
    what = f"split {first['split']}" if first["split"] else f"samples of the prompts {first['prompts']}"
    what += f" of {first['data']}" if first["data"] else ""
    out = Table(title=f"entropy in nats per token, {first['images']} images, {what}; ± standard error")
    changes = [row for row in rows if "change" in row]
    several = len({row["against"] for row in changes}) > 1
    out.add_column("policy", overflow="fold")
    out.add_column("mode", no_wrap=True)
    out.add_column("entropy", justify="right", no_wrap=True)
    if changes:
        out.add_column("change", justify="right", no_wrap=True)
    if several:
        out.add_column("against", overflow="fold")
    for row in rows:
        mode = row["mode"] if row["mode"] == "conditional" else f"guided, cfg {row['cfg_scale']:g}"
        cells = [f"{row['mean']:.4f} ± {row['standard_error']:.4f}"]
        if changes:
            has = "change" in row
            cells.append(f"{row['change']:+.4f} ± {row['change_error']:.4f}" if has else "")
        if several:
            cells.append(row.get("against", "") if row["mode"] == MODES[0] else "")
        out.add_row(row["policy"] if row["mode"] == MODES[0] else "", mode, *cells)
    return out


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: mean entropy against step (or by policy) ± standard error, and entropy by position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    steps = {row["policy"]: row["step"] for row in rows}
    along_run = _along_run(rows)
    for mode, color in COLORS.items():
        own = [row for row in rows if row["mode"] == mode]
        x = [steps[row["policy"]] if along_run else names.index(row["policy"]) for row in own]
        error = [row["standard_error"] for row in own]
        left.errorbar(x, [row["mean"] for row in own], error, color=color, marker="o", capsize=3, label=mode,
                      linestyle="-" if along_run else "none")  # fmt: skip
    left.set_ylabel("entropy, nats per token ± standard error")
    left.set_xlabel("step" if along_run else "")
    if not along_run:
        left.set_xticks(range(len(names)), [_shortened(name) for name in names])
        left.set_xlim(-0.5, len(names) - 0.5)
        if len(names) > 2:
            left.tick_params(axis="x", rotation=20, labelsize=8)
            for label in left.get_xticklabels():
                label.set_horizontalalignment("right")
    left.legend()
    left.grid(alpha=0.3)
    shown = [name for name in names if name in (names[0], names[-1])]
    for name, style in zip(shown, ("-", "--"), strict=False):
        for mode, color in COLORS.items():
            row = next(row for row in rows if row["policy"] == name and row["mode"] == mode)
            count = len(row["by_position"])
            place = [(index + 0.5) / count for index in range(count)]  # two resolutions on one axis
            right.plot(
                place, row["by_position"], style, color=color, label=f"{_shortened(name)}, {mode}", linewidth=1.3
            )
    right.set_xlabel("place of the token in the image, 0 first, 1 last")
    right.set_ylabel("entropy, nats")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    save_figure(path, figure)


def has_bars(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether there is something to compare: two policies or more that are not the steps of one run."""
    return len({row["policy"] for row in rows}) > 1 and not _along_run(rows)


def draw_bars(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each mode: bars ± standard error, side by side the policies of one size, resolution and kind.

    The axis does not start at zero: the differences are small beside the entropy itself. Above each bar but the first
    of its group stands the change with its own, paired error, which is smaller than the bars' errors suggest.
    """
    from matplotlib.figure import Figure

    families: dict[str, list[str]] = {}
    for row in rows:
        members = families.setdefault(row["family"], [])
        if row["policy"] not in members:
            members.append(row["policy"])
    widest = max(map(len, families.values()))
    count = sum(map(len, families.values()))
    figure = Figure(figsize=(max(8.0, 3.0 + 2.6 * count), 4.6), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2), MODES, strict=True):
        of = {row["policy"]: row for row in rows if row["mode"] == mode}
        ticks, names = [], []
        width = 0.8 / widest
        for group, members in enumerate(families.values()):
            for place, name in enumerate(members):
                row, x = of[name], group + (place - (len(members) - 1) / 2) * width
                error = row["standard_error"]
                axes.bar(x, row["mean"], 0.9 * width, yerr=error, capsize=3, color=SHADES[place % len(SHADES)])
                if place:
                    change = f"{row['change']:+.4f}\n± {row['change_error']:.4f}"
                    axes.annotate(change, (x, row["mean"] + error), (0, 4), textcoords="offset points", ha="center",
                                  fontsize=8)  # fmt: skip
                ticks.append(x)
                names.append(_shortened(name))
        axes.set_xticks(
            ticks, names, rotation=20 if count > 2 else 0, ha="right" if count > 2 else "center", fontsize=8
        )
        axes.set_xlim(-0.6, len(families) - 0.4)
        low = min(row["mean"] - row["standard_error"] for row in of.values())
        high = max(row["mean"] + row["standard_error"] for row in of.values())
        room = max(high - low, 0.02)
        axes.set_ylim(max(0.0, low - 0.5 * room), high + 0.4 * room)
        above = axes.secondary_xaxis("top")
        above.set_xticks(range(len(families)), list(families), fontsize=9)
        above.tick_params(length=0)
        scales = " and ".join(dict.fromkeys(f"{row['cfg_scale']:g}" for row in of.values()))
        axes.set_title(mode if mode == "conditional" else f"guided, cfg {scales}", fontsize=11)
        axes.set_ylabel(
            "entropy, nats per token ± standard error" + (" (not from 0)" if axes.get_ylim()[0] > 0 else "")
        )
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    save_figure(path, figure)


def _along_run(rows: Sequence[dict[str, Any]]) -> bool:
    return len({row["policy"] for row in rows}) > 1 and all(row["step"] is not None for row in rows)


def _shortened(name: str) -> str:
    """A name that fits below a bar: of a path the end, without the `policy` that every finished run has."""
    name = name.rstrip("/").removesuffix("/policy")
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
