from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import re
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import zlib
from pathlib import Path

import pytest
import trustme
from data_files import write_cifar10, write_mnist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dltrain.data import cifar as cifar_module
from dltrain.data import download as download_module
from dltrain.data import files as files_module
from dltrain.data import mnist as mnist_module
from dltrain.data.download import TIMEOUT, File, fetch, fetch_members
from dltrain.data.files import Files, Layout, Published
from dltrain.errors import DataError, OutputError

CONTENT = bytes(range(256)) * 40
PATIENCE = 0.5  # seconds: the time-out of the tests that wait for it


def file_of(content, name="file"):
    return File(name, len(content), hashlib.sha256(content).hexdigest())


FILE = file_of(CONTENT)


class Server:
    """Serves https on the loopback: path -> a function of the request handler."""

    def __init__(self, context):
        self.answers, self.asked, self.released = {}, [], threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.asked.append(self.path)
                self.close_connection = True
                outer.answers[self.path](self)

            def log_message(self, *args):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):  # a client that has hung up is what the tests want
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.base = f"https://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, path, answer):
        if isinstance(answer, bytes):
            answer = body(answer)
        self.answers[f"/{path}"] = answer
        return self.base + path

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


def body(content, status=200, length=None, **headers):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def without_length(content):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def chunked(content, end=b"0\r\n\r\n"):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n%b" % (len(content), content, end))

    return answer


def redirect(target):
    return body(b"", status=302, Location=target)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def server(authority, tmp_path, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setenv("NO_PROXY", "*")
    running = Server(context)
    yield running
    running.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "root" / "folder"


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def get(folder, *urls, file=FILE, **changes):
    notes = []
    fetch(urls, folder, file, **{"report": notes.append} | changes)
    return notes


@pytest.mark.parametrize("answer", [body(CONTENT), chunked(CONTENT), without_length(CONTENT)])
def test_a_download_arrives_under_its_name(server, folder, answer):
    get(folder, server.serve("file", answer))
    assert (folder / "file").read_bytes() == CONTENT
    assert left_in(folder) == ["file"]


def test_a_gzipped_download_is_stored_and_verified_uncompressed(server, folder):
    get(folder, server.serve("file.gz", gzip.compress(CONTENT)), gunzip=True)
    assert (folder / "file").read_bytes() == CONTENT


def test_what_is_there_is_not_downloaded(server, folder):
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"mine")
    get(folder, server.serve("file", CONTENT))
    assert server.asked == []
    assert (folder / "file").read_bytes() == b"mine"


def stall(server, first=b""):
    def answer(handler):
        body(first, length=len(CONTENT))(handler)
        handler.wfile.flush()
        server.released.wait()

    return answer


def trickle(server):
    def answer(handler):
        body(b"", length=len(CONTENT))(handler)
        for byte in CONTENT:
            handler.wfile.write(bytes([byte]))
            if server.released.wait(PATIENCE / 10):
                break

    return answer


def trickled_headers(server):
    """Each byte comes in time, and the answer never begins."""

    def answer(handler):
        for byte in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 10_000:
            handler.wfile.write(bytes([byte]))
            if server.released.wait(PATIENCE / 10):
                break

    return answer


def silence(server):
    return lambda handler: server.released.wait()


def hang_up(handler):
    handler.connection.close()


FAILURES = {
    "absent": (lambda server: body(b"no", status=404), "HTTP 404 Not Found"),
    "broken": (lambda server: body(b"no", status=503), "HTTP 503 Service Unavailable"),
    "cut off": (lambda server: body(CONTENT[:-1], length=len(CONTENT)), "cut off: 10239 of 10240 bytes"),
    "cut off in chunks": (lambda server: chunked(CONTENT[:-1], end=b""), "IncompleteRead"),
    "too short": (lambda server: body(CONTENT[:-1]), "wrong bytes: expected SHA-256"),
    "wrong bytes": (lambda server: body(CONTENT[::-1]), "wrong bytes: expected SHA-256"),
    "announced too long": (lambda server: body(CONTENT + b"!"), "10241 bytes announced, expected at most 10240"),
    "too long": (lambda server: without_length(CONTENT + b"!"), "more than 10240 bytes"),
    "too long in chunks": (lambda server: chunked(CONTENT + b"!"), "more than 10240 bytes"),
    "empty": (lambda server: body(b""), "wrong bytes: expected SHA-256"),
    "hangs up": (lambda server: hang_up, "closed|reset|EOF"),
    "not http": (lambda server: lambda handler: handler.wfile.write(b"?" * 9), r"\?{9}"),
    "to http": (
        lambda server: redirect("http://127.0.0.1/file"),
        "redirects to http://127.0.0.1/file, which is not https",
    ),
    "to a file": (lambda server: redirect("file:///etc/passwd"), "HTTP 302 .*file:///etc/passwd"),
    "to nowhere": (lambda server: redirect("https://[::1"), "Invalid IPv6 URL"),
    "in a circle": (lambda server: redirect("/bad"), "infinite loop"),
    "silence": (silence, f"no answer for {PATIENCE:g} s"),
    "stall": (lambda server: stall(server, CONTENT[:99]), f"no answer for {PATIENCE:g} s"),
    "trickle": (trickle, "less than 1024 bytes per second"),
    "trickled headers": (trickled_headers, "less than 1024 bytes per second"),
}


WAITS = ("silence", "stall", "trickle", "trickled headers")


@pytest.mark.parametrize("case", FAILURES)
def test_when_a_mirror_fails_the_next_is_tried(server, folder, case):
    answer, reason = FAILURES[case]
    bad, good = server.serve("bad", answer(server)), server.serve("good", CONTENT)
    notes = get(folder, bad, good, timeout=PATIENCE if case in WAITS else TIMEOUT)
    assert (folder / "file").read_bytes() == CONTENT
    assert left_in(folder) == ["file"]
    first, failure, second = notes
    assert (first, second) == (f"downloading file from {bad}", f"downloading file from {good}")
    assert re.match(f"{bad}: .*({reason})", failure)
    assert "\n" not in failure


@pytest.mark.parametrize("case", [case for case in FAILURES if case not in WAITS])
def test_when_every_mirror_fails_nothing_is_left(server, folder, case):
    answer, reason = FAILURES[case]
    bad = server.serve("bad", answer(server))
    with pytest.raises(DataError, match=f"file could not be downloaded: {bad}: .*({reason}).*; {bad}: .*({reason})"):
        get(folder, bad, bad)
    assert left_in(folder) == []


def test_an_https_redirect_is_followed(server, folder):
    server.serve("file", CONTENT)
    get(folder, server.serve("elsewhere", redirect("/file")))
    assert (folder / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("scheme", ["http", "file", "ftp", "data"])
def test_only_https_is_used(server, folder, scheme):
    server.serve("file", CONTENT)
    url = server.base.replace("https", scheme) + "file"
    with pytest.raises(DataError, match=f"unknown url type: {scheme}"):
        get(folder, url)
    assert server.asked == []


def test_a_certificate_that_nobody_vouches_for_is_refused(server, folder, monkeypatch, tmp_path):
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "another.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "another.pem"))
    with pytest.raises(DataError, match="CERTIFICATE_VERIFY_FAILED"):
        get(folder, server.serve("file", CONTENT))
    assert server.asked == []


def test_refused_connections_are_listed_for_every_mirror(server, folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        urls = [f"https://127.0.0.1:{closed.getsockname()[1]}/{name}" for name in "ab"]
        with pytest.raises(DataError) as caught:
            get(folder, *urls)
    for url in urls:
        assert re.search(f"{url}: .*Connection refused", str(caught.value))


def test_a_proxy_that_is_absent_is_an_error_too(server, folder, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(DataError, match="Connection refused"):
            get(folder, server.serve("file", CONTENT))
    assert server.asked == []


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        (CONTENT, "not gzip"),
        (gzip.compress(CONTENT, mtime=0)[:-12], "cut off inside the gzip stream"),
        (gzip.compress(CONTENT + bytes(2**20), mtime=0), "expands to more than 10240 bytes"),
        (gzip.compress(CONTENT, mtime=0)[:-6] + b"??????", "not gzip: .*incorrect data check"),
    ],
)
def test_broken_gzip_fails_a_mirror(server, folder, served, reason):
    with pytest.raises(DataError, match=reason):
        get(folder, server.serve("file.gz", served), gunzip=True)
    assert left_in(folder) == []


def test_a_bomb_is_not_inflated(server, folder, monkeypatch):
    inflated = []
    real = zlib.decompressobj

    class Counting:
        def __init__(self, wbits):
            self.real = real(wbits)

        def decompress(self, chunk, most):
            content = self.real.decompress(chunk, most)
            inflated.append(len(content))
            return content

    monkeypatch.setattr(download_module.zlib, "decompressobj", Counting)
    with pytest.raises(DataError, match="expands to more than 10240 bytes"):
        get(folder, server.serve("file.gz", gzip.compress(bytes(2**24))), gunzip=True)
    assert sum(inflated) == 10241


def test_what_an_earlier_process_left_is_no_hindrance(server, folder):
    folder.mkdir(parents=True)
    (folder / "file.part").write_bytes(bytes(10**6))
    get(folder, server.serve("file", CONTENT))
    assert (folder / "file").read_bytes() == CONTENT
    assert left_in(folder) == ["file"]


def test_the_file_is_flushed_to_the_disk_before_it_has_its_name(server, folder, monkeypatch):
    seen = []

    def fsync(descriptor):
        seen.append((os.fstat(descriptor).st_size, left_in(folder)))

    monkeypatch.setattr(download_module.os, "fsync", fsync)
    get(folder, server.serve("file", CONTENT))
    assert seen == [(len(CONTENT), ["file.part"])]


def test_progress_is_reported(server, folder, monkeypatch):
    monkeypatch.setattr(download_module, "REPORT_EVERY", 0)
    content = bytes(3_000_000)
    url = server.serve("file", content)
    notes = get(folder, url, file=file_of(content))
    assert notes[0] == f"downloading file from {url}"
    assert notes[-1] == "file: 3.0 of 3.0 MB"


def test_a_folder_that_cannot_be_made_is_an_output_error(server, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken/folder: cannot store a download there"):
        get(tmp_path / "taken" / "folder", server.serve("file", CONTENT))
    assert server.asked == []


def test_a_full_disk_is_an_output_error_and_leaves_nothing(server, folder, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module.os, "fsync", fsync)
    with pytest.raises(OutputError, match="file: cannot be written: No space left on device"):
        get(folder, server.serve("file", CONTENT), server.serve("other", CONTENT))
    assert left_in(folder) == []
    assert server.asked == ["/file"]  # another mirror would not help


FETCH = """
import sys
from pathlib import Path
from dltrain.data.download import File, fetch
url, folder, name, size, digest = sys.argv[1:]
fetch([url], Path(folder), File(name, int(size), digest), report=lambda note: print(note, flush=True))
"""


def test_two_processes_that_want_the_same_file_fetch_it_once(server, folder):
    asked = threading.Event()

    def answer(handler):
        asked.set()
        server.released.wait()
        body(CONTENT)(handler)

    url = server.serve("file", answer)
    command = [sys.executable, "-c", FETCH, url, str(folder), FILE.name, str(FILE.limit), FILE.sha256]
    start = {"stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent.parent}
    with subprocess.Popen(command, **start) as first:
        assert asked.wait(30)
        with subprocess.Popen(command, **start) as second:
            assert second.stdout.readline() == "waiting for another process that is fetching file\n"
            server.released.set()
            assert second.wait(30) == first.wait(30) == 0
    assert server.asked == ["/file"]
    assert (folder / "file").read_bytes() == CONTENT


def archive_of(*members):
    """A tar.gz of (name or TarInfo, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg() and content is not None:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


ONE, TWO = b"the first member", b"the second member"
MEMBERS = (file_of(ONE, "one"), file_of(TWO, "two"))


def take(server, root, archive, mirror=True, **changes):
    urls = [server.serve("set.tar.gz", archive)] if mirror else []
    fetch_members(urls, root, file_of(archive, "set.tar.gz"), "set", MEMBERS, **{"report": print} | changes)


def test_members_are_taken_and_the_downloaded_archive_removed(server, tmp_path):
    root = tmp_path / "root"
    take(server, root, archive_of(("set/readme", b"unwanted"), ("set/two", TWO), ("set/one", ONE)))
    assert (root / "set" / "one").read_bytes() == ONE
    assert (root / "set" / "two").read_bytes() == TWO
    assert left_in(root) == ["one", "two"]


def test_members_that_are_there_are_kept(server, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "one").write_bytes(b"mine")
    take(server, tmp_path, archive_of(("set/one", ONE), ("set/two", TWO)))
    assert (tmp_path / "set" / "one").read_bytes() == b"mine"
    assert (tmp_path / "set" / "two").read_bytes() == TWO


def test_an_archive_under_the_root_is_used_and_kept(server, tmp_path):
    archive = archive_of(("set/one", ONE), ("set/two", TWO))
    (tmp_path / "set.tar.gz").write_bytes(archive)
    take(server, tmp_path, archive)
    assert server.asked == []
    assert (tmp_path / "set" / "two").read_bytes() == TWO
    assert (tmp_path / "set.tar.gz").read_bytes() == archive


def test_an_archive_under_the_root_with_a_wrong_checksum_is_refused(server, tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(archive_of(("set/one", ONE), ("set/two", b"another")))
    with pytest.raises(DataError, match=r"set.tar.gz: expected SHA-256 .*, found .*; delete it to download it again"):
        take(server, tmp_path, archive_of(("set/one", ONE), ("set/two", TWO)))
    assert not (tmp_path / "set").exists()


GOOD = ("set/one", ONE)
MALICIOUS = {
    "parent": ([GOOD, ("set/../../escaped", TWO)], "does not hold set/two"),
    "absolute": ([GOOD, ("/tmp/escaped", TWO)], "does not hold set/two"),
    "dotted": ([GOOD, ("./set/two", TWO)], "does not hold set/two"),
    "symbolic link": ([GOOD, (special("set/two", tarfile.SYMTYPE, "../../escaped"), None)], "not a regular file"),
    "hard link": ([GOOD, (special("set/two", tarfile.LNKTYPE, "set/one"), None)], "not a regular file"),
    "device": ([GOOD, (special("set/two", tarfile.CHRTYPE), None)], "not a regular file"),
    "pipe": ([GOOD, (special("set/two", tarfile.FIFOTYPE), None)], "not a regular file"),
    "folder": ([GOOD, (special("set/two", tarfile.DIRTYPE), None)], "not a regular file"),
    "folder that is a link": (
        [(special("set", tarfile.SYMTYPE, ".."), None), GOOD],
        "does not hold set/two",
    ),
    "oversize": ([GOOD, ("set/two", TWO + b"!")], "set/two has 18 bytes, expected at most 17"),
    "wrong bytes": ([GOOD, ("set/two", TWO[::-1])], "set/two: wrong bytes: expected SHA-256"),
    "second of a name": ([GOOD, ("set/two", TWO[::-1]), ("set/two", TWO)], "set/two: wrong bytes"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_a_malicious_archive_writes_nothing_but_whole_members(server, tmp_path, case):
    members, message = MALICIOUS[case]
    root = tmp_path / "outer" / "root"
    with pytest.raises(DataError, match=message):
        take(server, root, archive_of(*members))
    assert set(left_in(tmp_path)) <= {"authority.pem", "one", "set.tar.gz"}
    assert not (root / "set").is_symlink()
    assert not Path("/tmp/escaped").exists()
    assert (root / "set" / "one").read_bytes() == ONE


TAR = gzip.decompress(archive_of(GOOD, ("set/two", TWO)))  # blocks of 512 bytes: header, member, header, member, …


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "not a readable tar.gz"),
        (b"not gzip", "not a readable tar.gz"),
        (gzip.compress(b"not tar" * 100, mtime=0), "not a readable tar.gz"),
        (gzip.compress(TAR[:1000], mtime=0), "set.tar.gz: "),
        (gzip.compress(TAR[:1030], mtime=0), "set.tar.gz: "),
        (gzip.compress(TAR[:1540], mtime=0), "set/two: unexpected end of data"),
        (gzip.compress(TAR[:1540], mtime=0)[:-9], "set.tar.gz: "),
    ],
)
def test_a_broken_archive_is_refused(server, tmp_path, archive, message):
    with pytest.raises(DataError, match=message):
        take(server, tmp_path / "root", archive)
    assert set(left_in(tmp_path / "root")) <= {"one", "set.tar.gz"}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(TAR) - 1), st.integers(0, 255)), max_size=6),
    kept=st.integers(0, len(TAR)),
    raw=st.booleans(),
)
def test_only_data_errors_come_out_of_arbitrary_archives(tmp_path, edits, kept, raw):
    """An archive that lies under the root, changed before or after its compression; nothing is written elsewhere."""
    content = bytearray(gzip.compress(TAR, mtime=0) if raw else TAR)
    for place, byte in edits:
        content[place % len(content)] = byte
    archive = bytes(content) if raw else gzip.compress(bytes(content[:kept]), mtime=0)
    with tempfile.TemporaryDirectory(dir=tmp_path) as outer:
        root = Path(outer) / "root"
        root.mkdir()
        (root / "set.tar.gz").write_bytes(archive)
        with contextlib.suppress(DataError):
            fetch_members([], root, file_of(archive, "set.tar.gz"), "set", MEMBERS, report=lambda note: None)
            assert (root / "set" / "two").read_bytes() == TWO
        assert set(left_in(Path(outer))) <= {"one", "two", "set.tar.gz"}
        for name, whole in (("one", ONE), ("two", TWO)):
            if (root / "set" / name).exists():
                assert (root / "set" / name).read_bytes() == whole


def test_missing_mnist_files_are_downloaded_into_their_place(server, tmp_path, monkeypatch):
    written = write_mnist(tmp_path / "publisher")
    published = {path.name: path.read_bytes() for path in (tmp_path / "publisher/MNIST/raw").iterdir()}
    layout = Layout("MNIST/raw", tuple(file_of(content, name) for name, content in published.items()))
    for name, content in published.items():
        server.serve(f"good/{name}.gz", gzip.compress(content))
        server.serve(f"bad/{name}.gz", body(b"gone", status=410))
    mirrors = (f"{server.base}bad/", f"{server.base}good/")
    monkeypatch.setattr(mnist_module, "MNIST", Published("MNIST", 200, 50, (layout,), mirrors=mirrors))
    write_mnist(tmp_path / "root")
    (tmp_path / "root/MNIST/raw/t10k-labels-idx1-ubyte").unlink()

    dataset = mnist_module.mnist(Files(tmp_path / "root"))
    assert server.asked == ["/bad/t10k-labels-idx1-ubyte.gz", "/good/t10k-labels-idx1-ubyte.gz"]
    assert dataset.verified
    assert dataset.test.labels.tolist() == written.test_labels.tolist()
    mnist_module.mnist(Files(tmp_path / "root"))
    assert len(server.asked) == 2


def test_files_that_are_kept_gzipped_are_stored_as_they_are_served(server, tmp_path, monkeypatch):
    written = write_mnist(tmp_path / "publisher", gz=True, folder="KMNIST")
    published = {path.name: path.read_bytes() for path in (tmp_path / "publisher/KMNIST/raw").iterdir()}
    layout = Layout("KMNIST/raw", tuple(file_of(content, name) for name, content in published.items()))
    for name, content in published.items():
        server.serve(name, content)
    facts = Published("KMNIST", 200, 50, (layout,), mirrors=(server.base,), gunzip=False)
    monkeypatch.setattr(mnist_module, "KMNIST_GZIPPED", layout)
    monkeypatch.setattr(mnist_module, "KMNIST", facts)
    dataset = mnist_module.kmnist(Files(tmp_path / "root"))
    assert dataset.verified
    assert dataset.test.labels.tolist() == written.test_labels.tolist()
    assert (tmp_path / "root/KMNIST/raw/t10k-labels-idx1-ubyte.gz").read_bytes() == published[
        "t10k-labels-idx1-ubyte.gz"
    ]
    server.serve("t10k-labels-idx1-ubyte.gz", gzip.compress(b"another file"))
    (tmp_path / "root/KMNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="wrong bytes: expected SHA-256") as caught:
        mnist_module.kmnist(Files(tmp_path / "root"))
    assert "gzipped or not" not in str(caught.value)


def test_missing_cifar_files_are_taken_from_the_archive(server, tmp_path, monkeypatch):
    written = write_cifar10(tmp_path / "publisher")
    folder = tmp_path / "publisher" / "cifar-10-batches-py"
    published = {path.name: path.read_bytes() for path in folder.iterdir()}
    archive = archive_of(*((f"cifar-10-batches-py/{name}", content) for name, content in published.items()))
    layout = Layout("cifar-10-batches-py", tuple(file_of(content, name) for name, content in published.items()))
    server.serve("cifar.tar.gz", archive)
    facts = Published("CIFAR-10", 50, 20, (layout,), mirrors=(server.base,), archive=file_of(archive, "cifar.tar.gz"))
    monkeypatch.setattr(cifar_module, "CIFAR10", facts)
    dataset = cifar_module.cifar10(Files(tmp_path / "root"))
    assert dataset.verified
    assert dataset.train.labels.tolist() == written.train_labels.tolist()
    assert server.asked == ["/cifar.tar.gz"]


def test_files_that_cannot_be_had_are_an_error_that_lists_the_mirrors(server, tmp_path, monkeypatch):
    layout = Layout("MNIST/raw", (FILE,))
    bad = [server.serve(f"{name}/file.gz", body(b"", status=404)) for name in "ab"]
    mirrors = (f"{server.base}a/", f"{server.base}b/")
    source = Published("MNIST", 1, 1, (layout,), mirrors=mirrors)
    with pytest.raises(DataError) as caught:
        Files(tmp_path).open(source)
    message = str(caught.value)
    for part in (*bad, "HTTP 404", str(tmp_path / "MNIST/raw"), files_module.NEEDS_NO_DOWNLOAD, "gzipped or not"):
        assert part in message
    assert "\n" not in message
