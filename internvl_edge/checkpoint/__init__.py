"""A checkpoint folder in either published layout, read strictly: configuration, tensors, tokenizer files."""
