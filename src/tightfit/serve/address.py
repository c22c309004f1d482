"""Where a server listens; imports nothing heavy, so that a wrong address is refused at once."""

import ipaddress
import socket

from tightfit.errors import UsageError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, which nobody can connect to before a server runs on it.

    Raises:
        UsageError: the address is not ours, or is in use.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(
            f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}",
            hint="choose another --port, or an address of this machine for --host",
        ) from error
    return bound
