"""tightrope: long contexts in tight memory.

The floors live in folders at the top of the repository and are imported as `tightrope.server`, `tightrope.engine`,
`tightrope.backends` and `tightrope.kernels`. In a checkout this file puts the repository's root in front of the
package's search path; in an installed wheel the floors already lie beside it.
"""

import os.path  # loaded by Python itself: nothing may be searched for yet, see tightrope/processes.py

__version__ = "0.1.0"

_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isfile(os.path.join(_root, "pyproject.toml")):
    __path__.insert(0, _root)
