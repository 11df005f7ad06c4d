"""TCP and TLS connections that leave no socket behind when they cannot be made."""

from __future__ import annotations

import asyncio
import socket
import ssl


async def open_socket(host: str, port: int) -> socket.socket:
    """A connection to the first address of `host` that takes it. Raises OSError."""
    loop = asyncio.get_running_loop()
    error: OSError = OSError(f"{host!r} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)  # noqa: FBT003 the standard library's signature
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
        except OSError as exc:
            sock.close()
            error = exc
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise error


def secure(
    sock: socket.socket, context: ssl.SSLContext, host: str, timeout_s: float
) -> ssl.SSLSocket:
    """TLS over a connection; blocks for the handshake. Raises OSError, and `sock` is closed."""
    secured = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        secured.settimeout(timeout_s)
        secured.do_handshake()
    except BaseException:
        secured.close()
        raise
    return secured
