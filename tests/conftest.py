"""What several test modules share is in `toys`, which they import by its name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
