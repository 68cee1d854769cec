"""Bundle -> answers, on a device: no torch, no export, no quantization."""
