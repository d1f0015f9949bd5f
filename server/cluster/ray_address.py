"""Where the processes of Ray Serve listen that hold our replicas, and where we do beside them."""

import ray
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica as serve_replica


def listen_at_home_only() -> str:
    """Have Ray's own server in this replica's process listen where the others of its node do; returns that address.

    It takes requests through Ray's handles, of which there are none here, unpickles what it is sent, and would listen
    on all addresses of the machine. To be called in the constructor: Ray starts it behind that. Ray 2.60 has no setting
    for it.
    """
    host: str = ray.util.get_node_ip_address()
    at = f"[{host}]:0" if ":" in host else f"{host}:0"
    assert vars(serve_replica)["add_port_to_grpc_server"], "Ray's server is told otherwise where to listen by now"
    vars(serve_replica)["add_port_to_grpc_server"] = lambda server, address: add_port_to_grpc_server(server, at)
    return host
