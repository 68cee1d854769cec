"""TensorRT: the engine that runs a bundle on a GPU, and `build/`, which builds the engine files."""
