"""What is wrong with a command line is told before torch is loaded: loading it takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import argrpo_cli
from argrpo_cli.cli.train import _tell_whose
from argrpo_cli.recipe import load_recipe

MISTAKES = [  # a command line, and what the error names
    (["sample", "--out", "x", "--policy", "nano-c3i"], "no policy 'nano-c3i'"),
    (["sample", "--out", "x", "--policy", "gone.pt"], "no checkpoint file gone.pt"),
    (["eval", "nano", "--baseline-cfg-scale", "2"], "--baseline-cfg-scale 2: there is no --baseline"),
    (
        ["eval", "geneval", "--baseline", "nano-t2i", "--baseline-cfg-scale", "0.5"],
        "--baseline-cfg-scale 0.5: must be 1 or more",
    ),
    (["sample", "--out", "x", "--class", "dgo"], "no class 'dgo'"),
    (
        ["sample", "--out", "x", "--policy", "c2i-b-256", "--class", "tenhc"],
        "no class 'tenhc' among this policy's 1000",
    ),
    (["sample", "--out", "x", "--policy", "nano-t2i"], "nano-t2i draws captions"),
    (["sample", "--out", "x", "--prompts", "nanno"], "no captions 'nanno'"),
    (["sample", "--out", "x", "--top-p", "2"], "--top-p 2: must be"),
    (["score", ".", "--rewards", "nano-clop"], "reward 'nano-clop' is unknown"),
    (["score", ".", "--rewards", "nano-clip", "--set", "nano-clip.x=1"], "no option 'x'"),
    (["score", "gone"], "no folder gone"),
    (["train", "nano/c3i"], "no recipe 'nano/c3i'"),
    (["train", "nano/c2i", "--set", "grpo.bta=1"], "unknown key 'grpo.bta'"),
    (["train", "nano/c2i", "--set", "rewards.terms=[{name: nano-clop}]"], "'nano-clop' is unknown"),
    (["train", "nano/c2i", "--set", "rewards.terms=[{name: loo-fid}]"], "reward loo-fid needs options.reference, or "),
    (
        ["train", "nano/c2i", "--set", "rewards.terms=[{name: loo-fid, options: {reference: gone.npz}}]"],
        "reward loo-fid: no file gone.npz",
    ),
    (["train", "nano/c2i", "--set", "policy.checkpoint=nano-c3i"], "no policy 'nano-c3i'"),
    (["train", "nano/c2i", "--set", "policy.checkpoint=nano-c3i", "--dry-run"], "no policy 'nano-c3i'"),
    (["train", "nano/c2i", "--set", "policy.checkpoint=nano-t2i"], "set conditions.source: captions"),
    (["train", "nano/c2i", "--set", "conditions.classes=[dgo]"], "no class 'dgo'"),
    (["train", "nano/cca", "--set", "real.path=gone"], "real.path gone: no folder, .npz or .tar files"),
    (["train", "nano/c2i", "--set", "start={method: pixel, real: {path: gone}}"], "real.path gone: no folder"),
    (["train", "nano/c2i", "--out", "used"], "used is not empty and not a run"),
    (["eval", "nano", "--policy", "nano-c3i"], "no policy 'nano-c3i'"),
    (["eval", "nano", "--n", "47"], "--n 47: give 48 to"),
    (["eval", "imagenet", "--policy", "nano-c2i", "--n", "3"], "--n 3: give 5 to"),
    (["eval", "geneval", "--baseline", "nano-c3i"], "no policy 'nano-c3i'"),
    (["eval", "geneval", "--n", "0"], "--n 0: give 1"),
    (["eval", "geneval", "--images", "gone"], "no folder gone"),
    (["eval", "geneval", "--detector", "gone"], "--detector gone: no such file or folder"),
    (["eval", "imagenet"], "nothing to measure"),
    (["eval", "imagenet", "--images", "gone"], "no folder or .npz file gone"),
    (["eval", "imagenet", "--policy", "nano-c2i", "--reference", "gone"], "no folder or .npz file gone"),
    (["eval", "imagenet", "--policy", "nano-c2i", "--out", "used"], "used is not empty"),
    (["eval", "imagenet", "--policy", "nano-c2i", "--seed", "99999"], "--seed 99999: give 0"),
    (["eval", "drawbench", "--columns", "clop"], "reward 'clop' is unknown"),
    (["eval", "drawbench", "--columns", "clip", "--set", "clip.x=1"], "no option 'x'"),
    (["eval", "drawbench", "--prompts", "owner/none", "--diversity", "dinov3"], "--diversity 'dinov3' is unknown"),
    (["eval", "drawbench", "--prompts", "nanno"], "no prompts 'nanno'"),
    (["eval", "geneval2", "--judge", "Qwen/none"], "cannot fetch Qwen/none"),
    (["eval", "geneval2", "--policy", "nano-c2i"], "nano-c2i draws classes, and eval geneval2 asks with captions"),
    (["eval", "imagenet", "--policy", "nano-t2i"], "nano-t2i draws captions, and eval imagenet asks with classes"),
    (["eval", "geneval2", "--judge", "none"], "there is no model folder 'none'"),
    (["eval", "geneval2", "--prompts", "gone.jsonl"], "cannot read gone.jsonl"),
    (["eval", "unigenbench", "--limit", "0"], "--limit 0: must be"),
    (["eval", "wise", "--diversity", "dinov3"], "--diversity 'dinov3' is unknown"),
    (["entropy", "--split", "train"], "no split 'train'"),
    (["entropy", "--policy", "nano-c3i"], "no policy 'nano-c3i'"),
    (["entropy", "--prompts", "nanno"], "no captions 'nanno'"),
    (["entropy", "--n", "1"], "--n 1: an interval needs 2"),
    (["entropy", "--temperature", "0"], "--temperature 0: without noise"),
    (["entropy", "--policy", "nano-c2i", "--policy", "nano-c2i"], "--policy names nano-c2i twice"),
    (["entropy", "--run", "gone"], "gone is no run directory"),
    (["entropy", "--data", "gone"], "no folder gone"),
    (["entropy", "--out", "used"], "used is not empty"),
]
JUDGE = "rewards.terms=[{name: judge-quality, options: {%s}}]"
REFUSED = [  # of `train nano/c2i`, by the start and by --dry-run alike
    (["--set", "seed=4294967296"], "seed = 4294967296: must be less than 4294967296"),
    (["--set", 'out="a\\0b"'], "text with a null byte"),
    (["--set", r'out="\ud800"'], "half a character"),
    (["--set", "out=used"], "used is not empty and not a run"),
    (["--set", "out=" + "x" * 300], "file name too long"),
    (["--set", "out=used/thesis.tex/run"], "thesis.tex"),
    (["--set", "out=~nosuchuser/x"], "there is no user"),
    (["--set", "conditions.captions=~nosuchuser/x"], "draws classes"),
    (["--set", JUDGE % "url: 'http://host/v1'"], "backend is 'local' and url given"),
    (["--set", JUDGE % "backend: server, url: 'http://me:hunter2@host/v1'"], "the url has a user"),
    (["--set", JUDGE % "backend: server, url: 'http://host/v1?key=hunter2'"], "the url has a user, parameters"),
    (["--set", JUDGE % "backend: server, url: 'http://me:hunter2@host', reading: guess"], "the url has a user"),
    (["--set", JUDGE % "url: ['http://me:hunter2@host']"], "the url has a user"),
    (["--set", JUDGE % "api_key: hunter2"], "api_key is a secret"),
    (["--set", JUDGE % "url: 'http://me:hunter2@host'" + "]"], "not valid YAML"),
    (["--set", "rewards.add={name: 'a:b', options: {x: {openai_api_key: hunter2}}}"], "openai_api_key is a secret"),
    (["--set", "rewards.terms.0.options.password=hunter2"], "password is a secret"),
    (["--set", "policy.checkpoint=https://me:hunter2@hub/c2i"], "the url has a user"),
    (["--set", "conditions.dataset={name: 'https://hunter2@hub/captions.parquet'}"], "the url has a user"),
    (["--set", JUDGE % "reading: logit"], "reading 'logit' is for the 0/1 questions"),
    (["--set", JUDGE % "attempts: 0"], "attempts is 0"),
    (["--set", "beta=0"], "? The keys are name"),
    (["--set", "beta=0"], "did you mean 'grpo.beta'?"),
    (["--set", "policy.cfg_scale=1"], "did you mean 'sampling.cfg_scale'?"),
    (["--steps", "0"], "--steps 0: "),
    (["--steps", "3", "--set", "grpo.steps=4"], "--steps 3 and --set grpo.steps=4 say two things"),
    (["--lr", "nan"], "grpo.learning_rate = nan: must be"),
    (["--seed", "-1"], "--seed -1: "),
    (["--accelerate-config", "ddp"], "for several processes; say how many with --processes"),
    (["--processes", "2", "--accelerate-config", "dpp"], "did you mean 'ddp'"),
    (["--processes", "2", "--device", "cuda:0"], "policy.device cuda:0: one GPU"),
    (["--set", "description=" + "many words " * 500, "--set", "grpo.beta=x"], "grpo.beta = 'x': must be a number"),
    (["--set", "grpo." + "x" * 5000 + "=1"], "unknown key"),
    (["--set", ".".join(["a"] * 5000) + "=1"], "a key of 5000 levels, and there are 50 at most"),
    (["--out", "runs/" + "x" * 300], "file name too long"),
]
MISTAKES += [(["train", "nano/c2i", *how, *options], text) for options, text in REFUSED for how in ([], ["--dry-run"])]
EACH = """
import contextlib, io, json, sys
from argrpo_cli.cli.app import run
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = run(arguments)
    print(json.dumps([code, "torch" in sys.modules, told.getvalue()]))
"""


def test_a_mistake_is_told_without_torch(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([arguments for arguments, _ in MISTAKES]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(argrpo_cli.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    for (arguments, message), line in zip(MISTAKES, done.stdout.splitlines(), strict=True):
        code, has_torch, told = json.loads(line)
        assert code == 2 and message in told and told.count("\n") == 1, (arguments, told)
        assert "hunter2" not in told and len(told) < 1500, told
        assert not has_torch, f"{arguments} loads torch before it says: {told}"
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["used", "used/thesis.tex"]


def test_steps_of_a_recipe_with_a_start_are_said_to_leave_that_alone(capsys):
    _tell_whose(load_recipe("nano/c2i", options={"steps": 3}), {"steps": 3})
    told = capsys.readouterr().err
    assert "\n--steps: of grpo; the start before it keeps its 150 updates at 0.0002" in told
    assert "--set start.distil.steps=N" in told
    _tell_whose(load_recipe("nano/c2i"), {"seed": 3})
    _tell_whose(load_recipe("nano/c2i", ["start=null"]), {"steps": 3})
    assert capsys.readouterr().err == ""
