"""Doors to other libraries, each with an extra of its own and never imported by anything else here."""
