"""Whether every link of the built site leads somewhere, and whether the site works without a network.

usage: python scripts/site_links.py SITE

Links inside the site must lead to a file that is there, and to an anchor that is in it. Of links to
elsewhere only the form is looked at: `make site-links` asks the network. Pictures, scripts and styles must be
the site's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "source": "src", "iframe": "src", "object": "data"}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {"", "top"}  # both are the top of every page
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and LOADED_LINKS & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])
        elif LOADED.get(tag) in values:
            self.loaded.append(values[LOADED[tag]])


def problems(site: Path) -> Iterator[str]:
    """Yield a sentence for each link that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: there is no page."
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        for link in page.loaded:
            if urlsplit(link).scheme not in ("", "data") or urlsplit(link).netloc:
                yield f"{here}: {link} comes from the network, without which the site must work."
        for link in [*page.links, *page.loaded]:
            if wrong := _wrong(link, path, pages):
                yield f"{here}: {link} {wrong}."


def _wrong(link: str, path: Path, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a link of the page at `path`; None if nothing is."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return None if "." in parts.netloc else "names no host"
    if parts.scheme:
        return None if parts.scheme in ("mailto", "data") else "is of no kind that a reader can follow"
    there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not there.is_file():
        return "leads to no file"
    if there in pages and unquote(parts.fragment) not in pages[there].anchors:
        return "leads to no such place in that page"
    return None


def main(site: Path) -> None:
    found = list(dict.fromkeys(problems(site)))
    if found:
        sys.exit("\n".join([*found, f"{len(found)} broken links in {site}"]))
    print(f"{len(list(site.rglob('*.html')))} pages, no broken link")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
