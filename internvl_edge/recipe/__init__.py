"""How a model is quantized: the choices as frozen data, and the TOML files that hold them."""
