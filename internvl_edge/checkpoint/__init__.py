"""Read a checkpoint folder of either published layout strictly: configuration, tensors, tokenizer files."""
