"""The properties of an InternVL model without any file: configuration, quantized linears, prompts, tokens and tiles."""
