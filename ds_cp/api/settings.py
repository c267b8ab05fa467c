"""What the HTTP application is told, from the config."""

from __future__ import annotations

from ds_cp.api.protocol import ServerSettings
from ds_cp.config import Config


def server_settings(config: Config) -> ServerSettings:
    """The server's part of the config as the application takes it."""
    server = config.server
    return ServerSettings(
        host=server.host,
        port=server.port,
        api_keys=server.api_keys,
        served_model_name=server.served_model_name,
        max_body_bytes=server.max_body_bytes,
        drain_timeout_s=server.drain_timeout_s,
    )
