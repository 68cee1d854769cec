"""The bundle that devices run: its manifest, its verification, its token table and its recorded quality."""
