"""What every room stands on: errors, units, files written whole, dataclasses as JSON, and facts about this machine."""
