"""Convert packed integer weights between their stored bytes and `PackedLinear`.

Each codec is a module with `pack`, `unpack` and the configuration JSON of its format. Codecs know bytes. They do not
know models or graphs.
"""
