"""Manual pages: what is taken from a package, and what is left of the markup."""

import gzip

import pytest
from debian_packages import deb_bytes

from jaxpeft.data import AssetError, manual_pages
from jaxpeft.data.manuals import plain_text

PAGE = r"""'\" t
.\" A comment
.TH toy 7 2023-02-05 "Linux"
.SH NAME
toy \- a \fBbold\fP name
.SH "SEE ALSO"
.BR ascii (7),
.IR file .
Ends\ here \(co.
.TS
l l.
1	2
.TE
.PP
Next \[dq]paragraph\[dq].
"""


def test_words_stay_and_markup_goes():
    want = 'NAME toy - a bold name\n\nSEE ALSO ascii(7), file. Ends here (c).\n\nNext "paragraph".'
    assert plain_text(PAGE) == want


def test_a_page_of_comments_has_no_text():
    assert plain_text('.\\" nothing\n.so man7/other.7\n') == ""


def test_pages_of_the_prose_sections_come_in_order_with_the_packages_version(cache):
    packed = gzip.compress(PAGE.encode())
    files = {
        "usr/share/man/de/man7/b.7.gz": packed,
        "usr/share/man/de/man5/a.5.gz": packed,
        "usr/share/man/de/man1/c.1.gz": packed,
        "usr/share/man/de/man7/empty.7.gz": gzip.compress(b".so man7/b.7\n"),
    }
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "manpages-de_4.1_all.deb").write_bytes(deb_bytes(files))
    pages = manual_pages("de")
    assert list(pages.texts) == ["a.5", "b.7"]
    assert pages.package == "manpages-de_4.1_all.deb"
    assert pages.texts["a.5"] == plain_text(PAGE)
    (cache / "downloads" / "manpages-de_4.1_all.deb").unlink()
    assert manual_pages("de") == pages, "the second call reads the cache"


def test_bad_languages_packages_and_a_missing_network_are_named_errors(cache):
    with pytest.raises(AssetError, match="no language code"):
        manual_pages("../de")
    with pytest.raises(AssetError, match=r"JAXPEFT_OFFLINE forbids.*manpages-fr_\*\.deb"):
        manual_pages("fr")
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    package = cache / "downloads" / "manpages-fr_1_all.deb"
    package.write_bytes(b"!<arch>\n")
    with pytest.raises(AssetError, match="not a whole Debian package"):
        manual_pages("fr")
    assert not package.exists()
    assert not (cache / "assets" / "manual-pages-fr").exists()
