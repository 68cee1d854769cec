"""Helpers that several test files share: tiny checkpoints, the independent reference, fakes, commands and data."""
