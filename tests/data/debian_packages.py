"""Small Debian packages for tests, made without any tool of Debian's."""

import gzip
import io
import lzma
import tarfile


def deb_bytes(files, compress=".xz"):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    data = {".xz": lzma.compress, ".gz": gzip.compress, "": bytes}[compress](tar.getvalue())
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar{compress}", data)):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out
