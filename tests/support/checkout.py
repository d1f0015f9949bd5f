"""Where the tests find what lies in the checkout."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
DATA = ROOT / "tests" / "data"
ADAPTERS = DATA / "adapters"
FORMATS = DATA / "formats"
PROSE = DATA / "prose.md"  # English that never changes, so that what models make of it does not either
TINY = FORMATS / "tiny"  # whole checkpoints of a few kilobytes
