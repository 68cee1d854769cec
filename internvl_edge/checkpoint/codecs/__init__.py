"""Packed integer weights as files store them, from and to `PackedLinear`. Knows bytes, nothing about models or graphs.

Each codec is a module with `pack` and `unpack` and the configuration JSON of its format.
"""
