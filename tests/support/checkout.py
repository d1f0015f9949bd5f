"""Where the tests find what lies in the checkout."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
DATA = ROOT / "tests" / "data"
ADAPTERS = DATA / "adapters"
FORMATS = DATA / "formats"
TINY = FORMATS / "tiny"  # whole checkpoints of a few kilobytes
