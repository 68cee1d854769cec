"""The base of all other packages: errors, units, atomic writes, dataclasses as JSON, and facts about the machine."""
