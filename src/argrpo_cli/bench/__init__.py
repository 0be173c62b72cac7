"""Speed, as ratios against a named baseline: `python -m argrpo_cli.bench.nano NAME`."""
