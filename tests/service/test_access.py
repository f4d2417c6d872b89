"""Who is let in, and what those who are not get to know: nothing."""

import base64
import json
import logging
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import flight

import actcache
from actcache.errors import (
    ActcacheError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from actcache.service import client as client_module
from actcache.service import numbers as numbers_module
from actcache.service import server as server_module
from actcache.service import wire
from actcache.service.access import Access, is_loopback
from actcache.service.link import Credentials
from actcache.service.server import Server
from actcache.service.shelf import Shelf, check_key
from tests.conftest import write_store
from tests.service.certificates import Signer
from tests.service.conftest import rows_in, same, url_of
from tests.service.test_service import SMALL, raw_ticket

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return write_store(
        tmp_path_factory.mktemp("guarded") / "s.zarr", n_sequences=24, seq_len=32, rows_per_chunk=32
    )


@pytest.fixture(scope="module")
def signer():
    return Signer()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Who is refused at the door is not asked to come again, so no test here needs patience."""
    monkeypatch.setattr(client_module, "_FIRST_CONTACT_S", 5.0)


def streams_alike(truth, url, options) -> bool:
    with actcache.open(truth.root).stream(**SMALL) as a, actcache.open(url, options).stream(**SMALL) as b:
        return same(rows_in(a), rows_in(b))


# Tokens.


def test_a_token_opens_and_nothing_else_does(truth, serve, caplog):
    server = serve(truth.root, Access(token=TOKEN))
    url = url_of(server)
    assert streams_alike(truth, url, {"token": TOKEN})
    n_refused = server.n_refused
    for options in ({}, {"token": TOKEN + "x"}, {"token": TOKEN[:-1]}, {"token": TOKEN.upper()}):
        with pytest.raises(RefusedError, match="wants a token") as caught:
            actcache.open(url, options)
        assert str(truth.root.parent) not in str(caught.value)
        assert TOKEN not in str(caught.value)
    assert server.n_refused == n_refused + 4
    said = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(said) == 4
    assert "no token" in said[0]
    assert "a wrong token" in said[1]
    assert not any(TOKEN in text for text in said)


@pytest.mark.parametrize(
    "header", [b"", b"Bearer", TOKEN.encode(), b"Basic " + base64.b64encode(TOKEN.encode())]
)
def test_every_method_asks_for_the_token(truth, serve, header):
    server = serve(truth.root, Access(token=TOKEN))
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    options = flight.FlightCallOptions(headers=[(b"authorization", header)] if header else [], timeout=10)
    path = flight.FlightDescriptor.for_path("s.zarr")
    for call in (
        lambda: list(client.list_flights(options=options)),
        lambda: client.get_flight_info(path, options),
        lambda: client.get_schema(path, options),
        lambda: client.do_get(flight.Ticket(json.dumps(raw_ticket(truth)).encode()), options).read_chunk(),
        *(
            lambda a=a: list(client.do_action(flight.Action(a, b"{}"), options))
            for a in server_module.ACTIONS
        ),
        lambda: client.list_actions(options),
    ):
        with pytest.raises((flight.FlightUnauthenticatedError, OSError), match="wants a token") as caught:
            call()
        assert "s.zarr" not in str(caught.value)


@pytest.mark.parametrize(
    "token", ["", "short", "has a space in it, too", "ünîcödé-tökèn-of-length", "x" * 15]
)
def test_tokens_that_are_none(token):
    with pytest.raises(UsageError, match="16 printable ASCII"):
        Access(token=token)


def test_a_token_shows_in_no_repr():
    assert TOKEN not in repr(Access(token=TOKEN))
    assert TOKEN not in repr(Credentials(token=TOKEN))


# TLS.


def test_tls_with_a_token(truth, serve, signer):
    pair = signer.sign("server")
    server = serve(truth.root, Access(token=TOKEN, cert=pair.cert, key=pair.key))
    url = url_of(server, scheme="grpc+tls")
    assert streams_alike(truth, url, {"token": TOKEN, "ca": signer.pem})
    with pytest.raises(RefusedError, match="wants a token"):
        actcache.open(url, {"ca": signer.pem})
    with pytest.raises(RefusedError, match="certificates of the two sides do not fit"):
        actcache.open(url, {"token": TOKEN, "ca": Signer("another").pem})
    with pytest.raises(RefusedError, match="certificates of the two sides do not fit"):
        actcache.open(url, {"token": TOKEN})  # nobody this system trusts signed it


def test_certificates_from_files(truth, serve, signer, tmp_path):
    pair = signer.sign("server")
    server = serve(truth.root, Access(cert=pair.cert, key=pair.key))
    (tmp_path / "ca.pem").write_bytes(signer.pem)
    url = url_of(server, scheme="grpc+tls")
    assert actcache.open(url, {"ca": str(tmp_path / "ca.pem")}).n_kept > 0
    with pytest.raises(NotFoundError, match="there is no file"):
        actcache.open(url, {"ca": str(tmp_path / "nowhere.pem")})
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="is not a PEM file"):
        actcache.open(url, {"ca": str(tmp_path / "text")})
    with pytest.raises(UsageError, match="needs its key"):
        actcache.open(url, {"cert": pair.cert})


def test_an_expired_server_is_not_talked_to(truth, serve, signer):
    pair = signer.sign("server", expired=True)
    server = serve(truth.root, Access(cert=pair.cert, key=pair.key))
    with pytest.raises(RefusedError, match="look at their dates"):
        actcache.open(url_of(server, scheme="grpc+tls"), {"ca": signer.pem})


def test_mtls_lets_in_those_whose_certificate_was_signed(truth, serve, signer, monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_CONTACT_S", 0.5)
    pair, mine = signer.sign("server"), signer.sign("client")
    server = serve(truth.root, Access(cert=pair.cert, key=pair.key, client_ca=signer.pem))
    url = url_of(server, scheme="grpc+tls")
    assert streams_alike(truth, url, {"ca": signer.pem, "cert": mine.cert, "key": mine.key})
    stranger, expired = Signer("another").sign("client"), signer.sign("client", expired=True)
    for options in ({}, stranger._asdict(), expired._asdict()):
        with pytest.raises((RefusedError, UnreachableError), match="certificate"):
            actcache.open(url, {"ca": signer.pem, **options})


def test_plain_clients_of_a_tls_server_and_the_reverse(truth, serve, signer, monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_CONTACT_S", 0.3)
    pair = signer.sign("server")
    tls, plain = serve(truth.root, Access(cert=pair.cert, key=pair.key)), serve(truth.root)
    with pytest.raises((RefusedError, UnreachableError)):
        actcache.open(url_of(tls))
    with pytest.raises((RefusedError, UnreachableError)):
        actcache.open(url_of(plain, scheme="grpc+tls"), {"ca": signer.pem})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"cert": b"x"}, "TLS needs both"),
        ({"key": b"x"}, "TLS needs both"),
        ({"client_ca": b"x"}, "need TLS"),
    ],
)
def test_halves_of_tls(given, match):
    with pytest.raises(UsageError, match=match):
        Access(**given)


# Where it listens.


def test_an_open_address_needs_authentication_and_tls(truth, signer):
    pair = signer.sign("server")
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        with pytest.raises(UsageError, match="nothing says who may come"):
            Server(str(truth.root), Access(), host=host)
        with pytest.raises(UsageError, match="nothing says who may come"):
            Server(str(truth.root), Access(cert=pair.cert, key=pair.key), host=host)
        with pytest.raises(UsageError, match="the token could be read on the way"):
            Server(str(truth.root), Access(token=TOKEN), host=host)
    for access in (
        Access(token=TOKEN, cert=pair.cert, key=pair.key),
        Access(cert=pair.cert, key=pair.key, client_ca=signer.pem),
    ):
        server = Server(str(truth.root), access, host="0.0.0.0")
        assert server.stop()


def test_it_listens_on_this_machine_only(truth, serve):
    server = serve(truth.root)
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in others - {"127.0.0.1"}:
        if is_loopback(str(address)):
            continue
        with socket.socket() as probe:
            probe.settimeout(2)
            assert probe.connect_ex((address, server.port)) != 0


def test_loopback_names():
    assert is_loopback("127.0.0.1")
    assert is_loopback("127.8.9.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("8.8.8.8")
    with pytest.raises(UsageError, match="no such address"):
        is_loopback("no.such.host.invalid")


def test_a_port_that_is_taken(truth, serve):
    taken = serve(truth.root).port
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="cannot listen on"):
            Server(str(truth.root), Access(), port=other.getsockname()[1])
    assert taken


def test_a_token_is_not_sent_without_tls_to_another_machine():
    with pytest.raises(UsageError, match="a token is not sent without TLS"):
        actcache.open("grpc://192.0.2.7:1234/s", {"token": TOKEN})


# What is malformed, and what lies outside.


def do_get(server, data: bytes) -> None:
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    reader = client.do_get(flight.Ticket(data), flight.FlightCallOptions(timeout=20))
    reader.read_chunk()


def kind_of(error: Exception) -> str:
    return json.loads(error.extra_info)["kind"]


@pytest.fixture(scope="module")
def server(truth):
    found = Server(str(truth.root.parent), Access())
    yield found
    found.stop()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (b"", "usage"),
        (b"\xff\x00garbage", "usage"),
        (b"[]", "usage"),
        (b"{" * 50_000, "usage"),
        (b"x" * (2 << 20), "usage"),
        ({"version": 2}, "usage"),
        ({"more": 1}, "usage"),
        ({"store": None}, "usage"),
        ({"store": "nowhere"}, "not_found"),
        ({"store": "../s.zarr"}, "usage"),
        ({"store": "/etc"}, "usage"),
        ({"epoch": -1}, "usage"),
        ({"window": 10**9}, "usage"),
        ({"window": "0"}, "usage"),
        ({"rank": 1}, "usage"),
        ({"world_size": 3}, "usage"),
        ({"world_size": 0}, "usage"),
        ({"part": 1}, "usage"),
        ({"parts": 1000}, "usage"),
        ({"first": 10**9}, "usage"),
        ({"plan": "0" * 64}, "cursor"),
        ({"captures": "0" * 64}, "cursor"),
        ({"selection": {}}, "usage"),
        ({"selection.hooks": ["nothing"]}, "usage"),
        ({"selection.hooks": []}, "usage"),
        ({"selection.layers": [99]}, "usage"),
        ({"selection.layers": []}, "usage"),
        ({"selection.stack": "sideways"}, "usage"),
        ({"selection.split": "../train"}, "usage"),
        ({"selection.shards": "0-99999999999"}, "usage"),
        ({"selection.shards": "x"}, "usage"),
        ({"selection.order": "random"}, "usage"),
        ({"selection.commit_shards": 3}, "usage"),
        ({"selection.window_rows": 0}, "usage"),
        ({"selection.window_rows": 10**30}, "usage"),
        ({"selection.partitions": 10**7}, "usage"),
        ({"selection.run_chunks": 0}, "usage"),
        ({"selection.seed": "1"}, "usage"),
        ({"selection.rules": None}, "usage"),
        ({"selection.rules.norm_limits": [1.0]}, "usage"),
        ({"selection.rules.norm_limits": ["a", "b"]}, "usage"),
        ({"selection.more": 1}, "usage"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_tickets_are_refused_and_leak_nothing(truth, server, change, kind, caplog):
    if isinstance(change, bytes):
        data = change
    else:
        ticket = raw_ticket(truth)
        for path, value in change.items():
            *parents, last = path.split(".")
            at = ticket
            for part in parents:
                at = at[part]
            at[last] = value
        data = json.dumps(ticket).encode()
    with caplog.at_level(logging.WARNING), pytest.raises(flight.FlightServerError) as caught:
        do_get(server, data)
    assert kind_of(caught.value) == kind, str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert str(truth.root.parent) not in str(caught.value)
    assert any("do_get" in record.getMessage() for record in caplog.records)
    assert server.status()["active_calls"] == 0


@given(data=st.binary(max_size=300))
@settings(max_examples=60)
def test_no_bytes_whatever_break_it(server, data):
    for call in ("do_get", *server_module.ACTIONS):
        error = None
        try:
            if call == "do_get":
                do_get(server, data)
            else:
                client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
                list(client.do_action(flight.Action(call, data), flight.FlightCallOptions(timeout=20)))
        except flight.FlightServerError as raised:
            error = raised
        assert error is None or kind_of(error) in ("usage", "not_found")
    assert server.status()["active_calls"] == 0


OUTSIDE = [
    "../secret",
    "s.zarr/../../secret",
    "/etc/passwd",
    "..",
    ".",
    "a/./b",
    "s.zarr/..",
    "~",
    "a//b",
    "a\\..\\b",
    "%2e%2e/secret",
    "a\x00b",
    "file:///etc/passwd",
    "x" * 5000,
    "acts/resid_post/rows/../../../../secret",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda n: repr(n)[:30])
def test_nothing_outside_has_a_name(truth, server, name, caplog):
    (truth.root.parent / "secret").write_text("the secret")
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    for action in ("read", "size", "names"):
        for asked in ({"store": "s.zarr", "key": name}, {"store": name, "key": "zarr.json"}):
            with pytest.raises((flight.FlightServerError, flight.FlightInternalError)) as caught:
                list(client.do_action(flight.Action(action, json.dumps(asked).encode())))
            assert kind_of(caught.value) in ("usage", "not_found"), str(caught.value)
            assert "the secret" not in str(caught.value)
            assert str(truth.root.parent) not in str(caught.value)
    with pytest.raises((flight.FlightServerError, TypeError)):
        client.get_flight_info(flight.FlightDescriptor.for_path(name))


def test_links_that_lead_out_lead_nowhere(truth, serve, tmp_path):
    (tmp_path / "secret").write_text("the secret")
    inner = write_store(tmp_path / "shown" / "s.zarr")
    (tmp_path / "shown" / "out.zarr").symlink_to(truth.root)
    (inner.root / "link").symlink_to(tmp_path / "secret")
    (inner.root / "folder").symlink_to(tmp_path)
    server = serve(tmp_path / "shown")
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    assert [info.descriptor.path for info in client.list_flights()] == [[b"s.zarr"]]
    for asked in (
        {"store": "out.zarr", "key": "zarr.json"},
        {"store": "s.zarr", "key": "link"},
        {"store": "s.zarr", "key": "folder/secret"},
    ):
        with pytest.raises(flight.FlightServerError) as caught:
            list(client.do_action(flight.Action("read", json.dumps(asked).encode())))
        assert kind_of(caught.value) in ("usage", "not_found")


@given(text=st.text(max_size=40))
def test_a_key_that_passes_stays_inside(text, tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "root"
    try:
        check_key(text)
    except UsageError:
        return
    assert (root / text).resolve().is_relative_to(root.resolve())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("budget.json", "{}"),
        ("expired-a.json", "{}"),
        ("ended-0.json", "{}"),
        ("consumer-../x.json", "{}"),
        ("consumer-a.json", "x" * 100_000),
        ("../zarr.json", "{}"),
        ("consumer-a.txt", "{}"),
    ],
)
def test_a_consumer_may_write_its_own_state_only(truth, server, name, text):
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    asked = json.dumps({"store": "s.zarr", "name": name, "text": text}).encode()
    with pytest.raises(flight.FlightServerError) as caught:
        list(client.do_action(flight.Action("put", asked)))
    assert kind_of(caught.value) == "usage"
    assert not (truth.root / ".live").exists()


def test_the_log_has_no_line_that_a_client_wrote(truth, server, caplog):
    name = "x\nERROR all is lost"
    with pytest.raises(flight.FlightServerError):
        do_get(server, json.dumps({**raw_ticket(truth), name: 1}).encode())
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert any("x\\x0aERROR" in record.getMessage() for record in caplog.records)


def test_what_nobody_foresaw_is_logged_and_not_told(truth, serve, monkeypatch, caplog):
    server = serve(truth.root)

    def fails(*_args):
        raise RuntimeError(f"something about {truth.root}")

    monkeypatch.setattr(Shelf, "open", fails)
    with pytest.raises(
        ActcacheError, match=r"the service failed \(RuntimeError\); its log says more under"
    ) as caught:
        actcache.open(url_of(server))
    assert str(truth.root) not in str(caught.value)
    assert any(str(truth.root) in str(record.exc_info) for record in caplog.records if record.exc_info)


def test_writing_methods_are_not_there(server):
    client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
    with pytest.raises(flight.FlightServerError, match="nothing can be written here") as caught:
        client.do_put(flight.FlightDescriptor.for_path("x"), wire.schema_of([]))[0].close()
    assert "Traceback" not in str(caught.value)
    with pytest.raises(flight.FlightServerError, match="nothing can be written here"):
        client.do_exchange(flight.FlightDescriptor.for_path("x"))[1].read_chunk()


def test_too_many_calls_at_once_are_put_off(truth, serve, monkeypatch):
    monkeypatch.setattr(numbers_module, "MOST_CALLS", 0)
    monkeypatch.setattr(client_module, "_FIRST_CONTACT_S", 0.2)
    with pytest.raises(UnreachableError, match="0 calls are under way"):
        actcache.open(url_of(serve(truth.root)))
