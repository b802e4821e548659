"""Certificates are held against each other before anything starts."""

import datetime
import ipaddress
import socket
import ssl
import threading

import pytest

from fedqsn_jax.core.errors import UserError
from fedqsn_jax.deploy import processes
from fedqsn_jax.deploy.__main__ import main
from fedqsn_jax.deploy.certificates import LOCAL, check_client, check_server

pytest.importorskip("cryptography", reason="certificates are made by what the extra brings")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _write(place, name, certificate, key):
    place.joinpath(f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    place.joinpath(f"{name}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _signed(place, name, issuer=None, names=(), days=2):
    """Writes a certificate and its key; without an issuer it is an authority's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    authority = issuer is None
    by, by_key = (name, key) if authority else issuer
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(by))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by_key.public_key()), critical=False
        )
    )
    if authority:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    if names:
        kinds = [
            x509.IPAddress(ipaddress.ip_address(each)) if each[0].isdigit() else x509.DNSName(each)
            for each in names
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(kinds), critical=False)
    _write(place, name, builder.sign(by_key, hashes.SHA256()), key)
    return name, key


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("certificates")
    authority, other = _signed(place, "ca"), _signed(place, "other")
    _signed(place, "server", authority, LOCAL)
    _signed(place, "stranger", other, LOCAL)
    _signed(place, "misnamed", authority, ("elsewhere.example",))
    _signed(place, "old", authority, LOCAL, days=-1)
    (place / "empty.pem").write_text("")
    return place


def check(place, certificate="server", key=None, authority="ca"):
    check_server(
        place / f"{certificate}.pem",
        place / f"{key or certificate}.key",
        place / f"{authority}.pem",
        LOCAL,
    )


MISTAKES = {
    "of another authority": ({"certificate": "stranger"}, "self-signed|unable to get"),
    "for other names": ({"certificate": "misnamed"}, "localhost"),
    "too old": ({"certificate": "old"}, "expired"),
    "with the key of another": ({"key": "stranger"}, "do not belong together"),
    "absent": ({"certificate": "none"}, "No such file"),
    "an authority that is none": ({"authority": "empty"}, "--authority="),
}


def test_certificates_that_fit(place):
    check(place)
    check(place, "stranger", authority="other")


@pytest.mark.parametrize("name", MISTAKES)
def test_certificates_that_do_not_fit(name, place):
    changed, words = MISTAKES[name]
    with pytest.raises(UserError, match=words) as error:
        check(place, **changed)
    assert "\n" not in str(error.value)


@pytest.fixture
def port(place):
    """A server with a certificate, on loopback."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "server.pem", place / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                try:
                    near.settimeout(5)
                    context.wrap_socket(near, server_side=True).close()
                except OSError:
                    near.close()

        serving = threading.Thread(target=serve)
        serving.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    serving.join()


def test_a_client_finds_whether_it_trusts_the_superlink(place, port, capsys, monkeypatch):
    monkeypatch.setattr(processes, "require_flower", lambda: None)
    check_client(f"127.0.0.1:{port}", place / "ca.pem")
    arguments = ["client", "--rows=npz:rows.npz", "--out=client.toml"]
    more = [f"--superlink=127.0.0.1:{port}", f"--authority={place / 'other.pem'}"]
    assert main([*arguments, *more]) == 2
    output, line = capsys.readouterr()
    assert (output, line.count("\n")) == ("", 1)
    assert f"--superlink=127.0.0.1:{port}: with --authority=" in line
    assert "is not trusted" in line


@pytest.mark.parametrize(("address", "words"), [("8000", "ADDRESS:PORT"), ("a:b", "ADDRESS:PORT")])
def test_an_address_that_is_none(address, words, place):
    with pytest.raises(UserError, match=words):
        check_client(address, place / "ca.pem")


def test_nobody_is_there(place):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match="no SuperLink answers"):
        check_client(f"127.0.0.1:{port}", place / "ca.pem")
