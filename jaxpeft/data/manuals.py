"""Manual pages in many languages, as running text: one subject, several languages, free to use.

Debian and Ubuntu carry the Linux man-pages in the package `manpages` and their translations in `manpages-<language>`.
They are fetched without root rights; what they say differs a little between releases, so the package's file name, which
carries the version, comes along.

    pages = manual_pages("de")
    pages.texts["ascii.7"]          # running text, the markup taken off
"""

import gzip
import lzma
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jaxpeft.data._files import AssetError, cache_dir, folder_written, locked, offline
from jaxpeft.data.assets import apt_download, data_tar

__all__ = ["ManualPages", "manual_pages", "plain_text"]

SECTIONS = ("man4", "man5", "man7")  # prose: devices, file formats, overviews


@dataclass(frozen=True)
class ManualPages:
    """Attributes:
    language: as asked for.
    package: the Debian package's file name, version included.
    texts: page name (`ascii.7`) to its text, in alphabetical order.
    """

    language: str
    package: str
    texts: dict[str, str]


def manual_pages(language: str = "en") -> ManualPages:
    """The pages of sections 4, 5 and 7 in one language.

    Args:
      language: "en", or a language that Debian has `manpages-<language>` for: de, fr, es, pl, ro, ...

    Raises:
      AssetError: no such package, no network, or a damaged package.
    """
    if not re.fullmatch(r"[a-z]{2}(-[a-z]{2})?", language):
        raise AssetError(f"{language!r} is no language code such as 'en', 'de' or 'pt-br'")
    package = "manpages" if language == "en" else f"manpages-{language}"
    name = f"manual-pages-{language}"
    folder = cache_dir() / "assets" / name
    with locked(name):
        if not folder.is_dir():
            with folder_written(folder) as temporary:
                _fill(temporary, name, package)
    texts = {p.stem: p.read_text() for p in sorted(folder.glob("*.txt"))}
    return ManualPages(language, (folder / "package").read_text(), texts)


def _fill(folder: Path, name: str, package: str) -> None:
    downloads = cache_dir() / "downloads"
    by_hand = f"put {package}_*.deb into {downloads}"
    found = sorted(downloads.glob(f"{package}_*.deb"))
    if not found and offline():
        raise AssetError(f"{name!r} is not in the cache and JAXPEFT_OFFLINE forbids fetching it: {by_hand}")
    archive = found[-1] if found else apt_download(name, package, downloads, by_hand)
    try:
        with data_tar(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                path = PurePosixPath(member.name)
                source = members.extractfile(member) if member.isfile() and path.parent.name in SECTIONS else None
                if source is None or path.suffix != ".gz":
                    continue
                text = plain_text(gzip.decompress(source.read()).decode("utf-8", "replace"))
                if text:  # a page that only points to another has none
                    (folder / f"{path.stem}.txt").write_text(text)
    except (OSError, ValueError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        archive.unlink()  # so that the next call fetches it anew
        raise AssetError(f"{archive} is not a whole Debian package: {error}; it was thrown away") from error
    (folder / "package").write_text(archive.name)


_WORDS = {"SH", "SS", "B", "I", "BI", "BR", "IB", "IR", "RB", "RI", "SM", "SB", "TP", "IP"}
_SYMBOLS = {
    "aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"', "ha": "^", "ti": "~", "co": "(c)", "em": "-",
    "en": "-", "bu": "*", "rs": "\\", "Fo": '"', "Fc": '"', "Bq": '"', "->": "->", "<-": "<-", "*(lq": '"',
}  # fmt: skip


def plain_text(roff: str) -> str:
    """The words of a roff manual page: comments, tables and markup are taken off, paragraphs keep an empty line."""
    lines, skipping = [], False
    for line in roff.splitlines():
        if line.startswith((".TS", ".EQ", ".nf", ".EX")):
            skipping = True
        elif line.startswith((".TE", ".EN", ".fi", ".EE")):
            skipping = False
        elif skipping or line.startswith(("'\\\"", '.\\"', "'")):
            continue
        elif line.startswith("."):
            macro, _, rest = line[1:].partition(" ")
            if macro in ("SH", "SS", "PP", "P", "LP", "TP", "IP"):
                lines.append("")
            if macro in _WORDS and macro not in ("TP", "IP"):
                words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)
                joiner = "" if len(macro) == 2 and macro not in ("SH", "SS", "SM", "SB") else " "
                lines.append(joiner.join(a or b for a, b in words))
        else:
            lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(\[[^]]*\]|\(..|.)", "", text)
    text = re.sub(r"\\\[([^]]*)\]|\\\((..)", lambda m: _SYMBOLS.get(m[1] or m[2], ""), text)
    text = re.sub(r"\\s[-+]?\d+|\\[&|^/,%:]|\\\".*", "", text)
    text = text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\e", "\\")
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if p)
