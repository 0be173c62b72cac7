"""A policy on the hub: its folder, and a card that says what it descends from, how it was trained and what came out.

push_policy("runs/demo", "me/dog-drawer")      # argrpo push runs/demo me/dog-drawer
load_policy("me/dog-drawer")                   # anywhere
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from argrpo_cli import __version__
from argrpo_cli.policy.folder import ADAPTER_OF, BUNDLED_POLICIES, CARD, PolicyCard, find_policy, unfinished
from argrpo_cli.policy.published import C2I_REPO, JANUS_OWNER, POLICIES, VAR_REPO
from argrpo_cli.runs.learning import conclusions
from argrpo_cli.runs.run import RunDirectory
from argrpo_cli.system.errors import UserError, first_line, without_secrets
from argrpo_cli.system.files import fill_template, read_json
from argrpo_cli.system.hub import check_repo, require_hub

# Files that make a policy, in its folder and in those of its tokenizer and text encoder; of a checkpoint the others are
# what only resuming needs.
FILES = (
    CARD, "config.json", "generation_config.json", "model*.safetensors", "model*.json", "tokenizer*", "*.model",
    "special_tokens_map.json", "vocab.*", "merges.txt", "*processor_config.json", "chat_template*",
)  # fmt: skip
LOGGED_OUT = "you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write"
PICTURES = {"before_after.png": "before and after", "curves.png": "curves"}
DEEPSEEK = "https://github.com/deepseek-ai/DeepSeek-LLM/blob/HEAD/LICENSE-MODEL"
# What weights may be used for, of the repository that they descend from; of others the card refers to the repository.
LICENCES = {
    C2I_REPO: {"license": "mit"},
    VAR_REPO: {"license": "mit"},
    **{
        entry.repo: {"license": "other", "license_name": "deepseek", "license_link": DEEPSEEK}
        for entry in POLICIES.values()
        if entry.repo.startswith(f"{JANUS_OWNER}/")
    },
}


def push_policy(
    source: str | Path, repo: str, *, private: bool | None = None, message: str = "", results: str = ""
) -> str:
    """Put the policy of a run, or a policy folder, on the hub; its address there.

    The repository is made if it is not there, and gets the policy folder, README.md, and of a run its recipe.yaml and
    pictures, in one commit. Adapters are merged into their base first. Who pushes is whom `hf auth login` or HF_TOKEN
    says.

    Args:
        source: a run directory, a checkpoint of one, or a policy folder.
        private: whether a repository that is made is; None is as the account or organization says.
        message: of the commit.
        results: Markdown for the card, such as tables of evaluations.

    Raises:
        UserError: no policy there, no such name, not logged in or not allowed to, or the hub is not reached.
    """
    check_repo(repo)
    if str(source) in BUNDLED_POLICIES:
        raise UserError(f"{source} comes with the package; give a run directory or a policy folder of your own")
    source = Path(source)
    if not source.exists():
        raise UserError(f"no run directory or policy folder {source}")
    folder = find_policy(source)
    card = read_json(folder / CARD, PolicyCard)
    with _telling(f"cannot push to {repo}"):
        require_hub()
        from huggingface_hub import CommitOperationAdd, HfApi

        hub = HfApi()
        address = hub.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if ADAPTER_OF in card:
            from argrpo_cli.policy import load_policy

            load_policy(folder).save(scratch)
            folder, card = Path(scratch), read_json(Path(scratch) / CARD, PolicyCard)
        files = {path.relative_to(folder).as_posix(): path for path in _files_of(folder)}
        run = RunDirectory(source) if (source / "recipe.yaml").is_file() else None
        if run is not None:
            extra = (run.recipe_file, *(source / name for name in PICTURES))
            files |= {path.name: path for path in extra if path.is_file()}
        text = model_card(repo, card, source, run, files, results)
        operations = [CommitOperationAdd("README.md", text.encode())]
        operations += [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
        with _telling(f"cannot push to {repo}"):
            hub.create_commit(repo, operations, commit_message=message or f"{card.get('base', 'policy')} by argrpo")
    return str(address)


def model_card(
    repo: str,
    card: Mapping[str, Any],
    source: Path,
    run: RunDirectory | None,
    files: Mapping[str, Path],
    results: str = "",
) -> str:
    """The README.md of a policy on the hub, with the hub's front matter."""
    from argrpo_cli.recipe import load_recipe

    recipe = None if run is None else load_recipe(run.recipe_file, tell=lambda line: None)
    base = str(card.get("base", "")) if recipe is None else recipe.policy.checkpoint
    entry = POLICIES.get(base.partition("@")[0])
    licence = {"license": "mit"} if base in BUNDLED_POLICIES else LICENCES.get(entry.repo if entry else "")
    classes = card.get("classes")
    records, notes = (run.metrics(), run.notes()) if run is not None else ([], {})
    return fill_template(
        Path(__file__).with_name("push.md.j2"),
        repo=repo,
        title=repo.partition("/")[2],
        version=__version__,
        base=base if base in (*BUNDLED_POLICIES, *POLICIES) else Path(base).name,
        base_repo=entry.repo if entry else None,
        licence=licence,
        captions=classes is None,
        example=classes[0].partition(",")[0] if classes else "a photo of a dog",
        pixels=card.get("image_size"),
        sampling=card.get("sampling") or {},
        recipe=recipe,
        unfinished=unfinished(source),
        conclusions=conclusions(records, recipe.optim.batch_size, notes) if recipe is not None else [],
        transfer=notes.get("transfer") or [],
        versions={name: one for name, one in (notes.get("versions") or {}).items() if name != "python"},
        pictures={name: words for name, words in PICTURES.items() if name in files},
        results=results,
    )


def _files_of(folder: Path) -> Iterator[Path]:
    """What of a policy folder makes a policy, see `FILES`."""
    parts = [path for path in folder.iterdir() if path.is_dir() and (path / "config.json").is_file()]
    for place in (folder, *parts):
        for path in sorted(place.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in FILES):
                yield path


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Within this context what the hub answers is a UserError: `what`, why, and how to mend it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        import httpx2

        if not isinstance(error, httpx2.HTTPError | OSError | ValueError):  # the hub's own are of the first kind
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        why, mend = without_secrets(first_line(error)), ""
        if status == 401:
            why = LOGGED_OUT
        elif status == 403:
            why, mend = "your token may not write there", "; give one of your own names, or a token that may write"
        raise UserError(f"{what}: {why}{mend}") from error


def check_login(repo: str) -> None:
    """UserError where nobody is logged in who could push to a repository; the hub is not asked."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"logging.push_to_hub: {repo}: {LOGGED_OUT}")
