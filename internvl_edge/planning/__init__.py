"""Whether a model fits a device and how fast it can be there, computed from numbers alone; opens no device."""
