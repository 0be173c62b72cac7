"""LlamaGen: the model, its tokenizer, sampling, and its published files."""
