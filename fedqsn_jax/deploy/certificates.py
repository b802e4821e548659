"""Certificates that do not fit, found before anything is started and told in a line."""

import socket
import ssl
from pathlib import Path

from fedqsn_jax.core.errors import UserError

LOCAL = ("localhost", "127.0.0.1")
"""Names by which programs on the server's machine call the SuperLink."""

_SECONDS = 10.0


def check_server(certificate: Path, key: Path, authority: Path, names: tuple[str, ...]) -> None:
    """Makes sure that clients will trust a SuperLink, without starting one.

    Args:
      certificate: The SuperLink's.
      key: Its private key.
      authority: What clients get.
      names: What it is called by.

    Raises:
      UserError: A file cannot be read, the key is another certificate's, or the certificate is of
        another authority, too old, or for other names.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"--certificate={certificate}, --key={key}: they cannot be read, or do not belong "
            f"together: {_reason(error)}"
        ) from error
    client = _trusting(authority)
    for name in names:
        try:
            _shake_hands(client, server, name)
        except ssl.SSLError as error:
            raise UserError(
                f"--certificate={certificate}: with --authority={authority} a client that calls "
                f"it {name} does not trust it: {_reason(error)}"
            ) from error


def check_client(superlink: str, authority: Path) -> None:
    """Makes sure that a client can trust the SuperLink that is there.

    Args:
      superlink: ``ADDRESS:PORT``.
      authority: What the client has got of the server.

    Raises:
      UserError: It is not there, or its certificate is of another authority or for other names.
    """
    address, _, port = superlink.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--superlink={superlink}: allowed is ADDRESS:PORT")
    trusting = _trusting(authority)
    try:
        with (
            socket.create_connection((address, int(port)), _SECONDS) as connection,
            trusting.wrap_socket(connection, server_hostname=address),
        ):
            return
    except ssl.SSLError as error:
        raise UserError(
            f"--superlink={superlink}: with --authority={authority} it is not trusted: "
            f"{_reason(error)}"
        ) from error
    except OSError as error:
        raise UserError(f"--superlink={superlink}: no SuperLink answers: {error}") from error


def _trusting(authority: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--authority={authority}: {_reason(error)}") from error


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """Lets the two begin a connection in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    ]
    # Each needs a few turns; one that is never content would have raised.
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is no certificate"
    return getattr(error, "strerror", None) or str(error)
