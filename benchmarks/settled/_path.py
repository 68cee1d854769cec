"""Let a script in this folder import what it shares with the other benchmarks: `import _path` before `record`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
