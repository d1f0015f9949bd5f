"""The variables that a cluster sets in each container for a service whose name begins with ours: they are no settings.

For a service `tightrope` Kubernetes sets TIGHTROPE_SERVICE_HOST and TIGHTROPE_SERVICE_PORT, and, as docker did for
linked containers, TIGHTROPE_PORT=tcp://10.0.0.3:80 with TIGHTROPE_PORT_80_TCP and its parts.

Source: Kubernetes' documentation, Concepts, Service, "Environment variables".
"""

import re
from collections.abc import Iterable

_ADDRESS = re.compile(r"TIGHTROPE_(\w+_)?PORT(_\d+_(TCP|UDP|SCTP))?")
_PART = re.compile(
    r"TIGHTROPE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR))", re.ASCII
)


def is_of_a_service(name: str, value: str) -> bool:
    """Whether a variable tells of a service. One named as an option's is where its value is an address."""
    return _PART.fullmatch(name) is not None or ("://" in value and _ADDRESS.fullmatch(name) is not None)


def describe(names: Iterable[str]) -> list[str]:
    """One line on such variables; none where there are none."""
    found = sorted(names, key=len)
    if not found:
        return []
    return [
        f"{len(found)} variables such as {found[0]} change nothing: a cluster has set them for a service of that name"
    ]
