"""How a model is to be quantized: the choices as frozen data, and the TOML files that state them."""
