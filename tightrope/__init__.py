"""tightrope: long contexts in tight memory.

The floors live in folders at the top of the repository and are imported as `tightrope.server`, `tightrope.engine`,
`tightrope.backends` and `tightrope.kernels`. In a checkout this file puts the repository's root in front of the
package's search path; in an installed wheel the floors already lie beside it.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.insert(0, str(_root))
