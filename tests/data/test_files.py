"""Downloads survive cut connections and bad servers; nothing is ever half there."""

import hashlib
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxpeft.data import _files
from jaxpeft.data._files import AssetError, cache_dir, download, folder_written, offline, written

HERE = Path(__file__).parents[2]
# The room alone, without what the package's own __init__ imports.
ROOT = (
    "import sys, types\nroot = types.ModuleType('jaxpeft'); root.__path__ = ['jaxpeft']\n"
    "sys.modules['jaxpeft'] = root\n"
)

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `cuts` lists after how many bytes each coming answer breaks off, `statuses` forced answers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.statuses, self.ranges, self.seen = CONTENT, [], [], True, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin?token=secret"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.seen.append(asked)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            total = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        self.wfile.write(body)


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def get(server, target, **options):
    waits = []
    path = download(server.url, target, sha256sum=DIGEST, sleep=waits.append, **options)
    return path, waits


def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cuts = [300_000, 200_000]
    path, _ = get(server, tmp_path / "a.bin")
    assert path.read_bytes() == CONTENT
    assert server.seen == [None, "bytes=300000-", "bytes=500000-"]
    assert not (tmp_path / "a.bin.part").exists()


def test_what_an_earlier_process_left_is_continued(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    path, _ = get(server, tmp_path / "a.bin")
    assert path.read_bytes() == CONTENT
    assert server.seen == ["bytes=1000-"]


def test_a_whole_part_file_needs_no_further_byte(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    path, _ = get(server, tmp_path / "a.bin")
    assert path.read_bytes() == CONTENT
    assert server.seen == [f"bytes={len(CONTENT)}-"]  # answered 416


@pytest.mark.parametrize("left", [b"\xff" * 1000, CONTENT + b"more"])
def test_a_damaged_part_file_is_thrown_away_and_fetched_from_the_start(server, tmp_path, left):
    (tmp_path / "a.bin.part").write_bytes(left)
    path, _ = get(server, tmp_path / "a.bin")
    assert path.read_bytes() == CONTENT
    assert server.seen[-1] is None


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges, server.cuts = False, [300_000]
    path, _ = get(server, tmp_path / "a.bin")
    assert path.read_bytes() == CONTENT


def test_server_errors_are_retried_with_doubled_waits(server, tmp_path):
    server.statuses = [503, 500, 429]
    path, waits = get(server, tmp_path / "a.bin", backoff=0.5)
    assert path.read_bytes() == CONTENT
    assert waits == [0.5, 1.0, 2.0]


def test_it_gives_up_after_tries_without_progress_and_keeps_what_came(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    server.statuses = [503] * 10
    with pytest.raises(AssetError, match=r"3 tries in a row brought nothing.*1,000 bytes are kept"):
        get(server, tmp_path / "a.bin", retries=2)
    assert (tmp_path / "a.bin.part").stat().st_size == 1000
    assert not (tmp_path / "a.bin").exists()


def test_a_refusal_is_told_at_once_and_without_secrets(server, tmp_path):
    server.statuses = [404]
    with pytest.raises(AssetError, match="the server answers 404") as caught:
        get(server, tmp_path / "a.bin")
    assert "secret" not in str(caught.value)
    assert len(server.seen) == 1
    assert _files.without_secrets("https://me:pass@host:8/p?q=1#f") == "https://host:8/p"


def test_other_bytes_than_promised_are_refused(server, tmp_path):
    server.content = b"something else"
    with pytest.raises(AssetError, match="expected " + DIGEST):
        get(server, tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_no_server_at_all_is_an_asset_error(tmp_path):
    with pytest.raises(AssetError, match="brought nothing"):
        download("http://127.0.0.1:9/x", tmp_path / "x", sha256sum=DIGEST, retries=1, sleep=lambda _: None)


def test_a_file_address_is_copied_and_checked(tmp_path):
    source = tmp_path / "with space.bin"
    source.write_bytes(CONTENT)
    assert download(source.as_uri(), tmp_path / "b.bin", sha256sum=DIGEST).read_bytes() == CONTENT
    with pytest.raises(AssetError, match="sha256"):
        download(source.as_uri(), tmp_path / "c.bin", sha256sum="0" * 64)
    with pytest.raises(AssetError, match="cannot read"):
        download((tmp_path / "none").as_uri(), tmp_path / "d.bin", sha256sum=DIGEST)


def test_a_file_appears_only_when_its_block_ends_well(tmp_path):
    target = tmp_path / "sub" / "f"
    with pytest.raises(ZeroDivisionError), written(target) as file:
        file.write(b"half" * (1 // 0))
    assert list(target.parent.iterdir()) == []
    with written(target) as file:
        file.write(b"whole")
    assert target.read_bytes() == b"whole"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "sub" / "d"
    for text in ("one", "two"):
        with folder_written(target) as folder:
            (folder / "f").write_text(text)
    with pytest.raises(ZeroDivisionError), folder_written(target) as folder:
        (folder / "f").write_text("three" * (1 // 0))
    assert (target / "f").read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


def test_a_second_process_waits_for_the_lock(cache, tmp_path):
    """Four processes append begin and end marks under the lock: marks never interleave."""
    pytest.importorskip("fcntl")
    log = tmp_path / "log"
    program = (
        f"{ROOT}import time\nfrom jaxpeft.data._files import locked\n"
        "with locked('x'):\n"
        f"    open({str(log)!r}, 'a').write('b')\n    time.sleep(0.1)\n    open({str(log)!r}, 'a').write('e')\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], cwd=HERE) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert log.read_text() == "be" * 4


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("JAXPEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "jaxpeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "jaxpeft"
    for value, expected in (("1", True), ("0", False), ("", False), ("no", False), ("yes", True)):
        monkeypatch.setenv("JAXPEFT_OFFLINE", value)
        assert offline() is expected


def test_importing_the_room_is_light():
    """Neither tensorflow-datasets nor scikit-learn nor jax is imported before it is needed."""
    program = (
        f"{ROOT}import jaxpeft.data\n"
        "names = {'tensorflow_datasets', 'sklearn', 'rich', 'tokenizers', 'huggingface_hub', 'jax'}\n"
        "heavy = names & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gzip_is_never_asked_for(server, tmp_path, monkeypatch):
    """In a compressed answer the byte positions would be others than the file's: the request says identity."""
    seen = []
    serve = Handler.do_GET

    def watched(self):
        seen.append(self.headers["Accept-Encoding"])
        serve(self)

    monkeypatch.setattr(Handler, "do_GET", watched)
    get(server, tmp_path / "a.bin")
    assert seen == ["identity"]
