"""TensorRT: the engine that runs plans on a GPU, and `build/`, which makes them."""
