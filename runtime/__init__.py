"""Run a bundle on a device and return answers. This package needs no torch, no export and no quantization."""
