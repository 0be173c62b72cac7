"""GenEval: its prompts, the rules that judge an image by what a detector found in it, and the summary of a run."""
