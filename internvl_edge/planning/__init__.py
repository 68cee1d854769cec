"""Predict whether a model fits a device and how fast it can be there, from numbers alone. No device is opened."""
