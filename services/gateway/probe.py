"""Whether this container's gateway answers /health, for health checks: ``python -m services.gateway.probe``.

It asks where CODEGRAFT_LISTEN says, over HTTPS where the gateway has a certificate, and exits with 0 or 1. That
certificate is not checked: it is the gateway's own machine, and the name on it is another one.
"""

from __future__ import annotations

import http.client
import ssl
import sys

from services.core import config
from services.core.errors import CodegraftError
from services.core.rpc.probe import own_address
from services.gateway.config import GatewaySettings

_SECONDS = 4.0


def main() -> int:
    """Entry point; the exit status."""
    try:
        settings = config.load(GatewaySettings)
        address = own_address(settings.listen)
        connection = (
            http.client.HTTPSConnection(address, timeout=_SECONDS, context=ssl._create_unverified_context())
            if settings.gateway_cert_file
            else http.client.HTTPConnection(address, timeout=_SECONDS)
        )
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (CodegraftError, OSError, http.client.HTTPException) as error:
        print(error, file=sys.stderr)
        return 1
    if status != 200:
        print(f"{address} answers {status}", file=sys.stderr)
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
