"""The listening socket."""

from __future__ import annotations

import pytest

from ds_cp.api.server import bind
from ds_cp.errors import LaunchError


def test_bind_says_what_is_wrong() -> None:
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(LaunchError, match=f"port {port} is in use; choose another") as error:
        bind("127.0.0.1", port)
    assert "\n" not in str(error.value)
    first.close()
    again = bind("127.0.0.1", port)
    again.close()
    with pytest.raises(LaunchError, match="no address of this machine"):
        bind("192.0.2.1", 0)
    for port in (70_000, -1):
        with pytest.raises(LaunchError, match="0 to 65535"):
            bind("127.0.0.1", port)
    with pytest.raises(LaunchError, match="server.host"):
        bind("not a host", 8000)
