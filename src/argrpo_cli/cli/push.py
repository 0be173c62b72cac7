"""`argrpo push`: a policy to the hub."""

from __future__ import annotations

from pathlib import Path

from argrpo_cli.cli.options import command, present, tell


@command(tells=("json", "quiet"))
def push(
    run: Path, user_name: str, private: bool = False, message: str = "", results: list[Path] | None = None
) -> None:
    """Push a trained policy to the hub, with a card: what it descends from, its recipe, results and pictures.

    `argrpo sample --policy USER/NAME` and every other --policy open it from there. Log in first: `hf auth login`.

    Options:
        RUN: A run directory, a checkpoint, or a policy folder.
        USER/NAME: The repository, which is made if it is not there.
        --private: Make the repository a private one.  [default: as the account says]
        --message: Of the commit.
        --results FILE|FOLDER: Results of eval, score or entropy for the card; repeatable.
    """
    from argrpo_cli.policy.folder import say_unfinished
    from argrpo_cli.push import push_policy
    from argrpo_cli.system.hub import check_repo

    check_repo(user_name)
    tables = ""
    if results:
        from argrpo_cli.evals.tables import markdown, read_results

        tables = markdown(read_results(results))
    say_unfinished(run)
    address = push_policy(run, user_name, private=private or None, message=message, results=tables)
    present(lambda: {"repo": user_name, "url": address})
    tell(f"{run} is at {address}")
