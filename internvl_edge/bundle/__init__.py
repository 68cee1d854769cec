"""The bundle that devices run: its manifest and verification, its token table, and the quality recorded in it."""
