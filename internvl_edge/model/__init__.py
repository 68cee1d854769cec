"""What an InternVL model is, apart from any file: configuration, quantized linears, prompts, tokens and tiles."""
