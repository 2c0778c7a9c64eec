"""Makes the handmade batches of the distributed tests importable here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "dist"))
