"""Statistics and weights -> a quantised checkpoint."""
