"""Pre-training of Vision Transformers from finished token caches; no tokenizer is ever imported."""
