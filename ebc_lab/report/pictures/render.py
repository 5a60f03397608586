"""A figure as files: PNG, and SVG small enough to embed; the same bytes at every call.

Text stays text in the SVG (`svg.fonttype: none`): it can be selected, searched and read out, and takes a
fifth of the bytes that outlines take. Its layout was measured in DejaVu Sans, about the widest face there is,
so that a reader's own sans-serif leaves a little air instead of running into something.
"""

from __future__ import annotations

import io
import itertools
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib

from .drawing.sheet import Sheet

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FACES = "'DejaVu Sans', Verdana, Arial, sans-serif"  # the style's, and what stands in for it
FACE = "font-family: 'DejaVu Sans'"  # of every text: said once
NUMBER = re.compile(r"-?\d+\.\d+")
PLACES = ("d", "x", "y", "transform", "width", "height")  # attributes that say where
NO_PDF_METADATA = {"CreationDate": None, "Creator": None, "Producer": None}
NARROW_DPI = 200
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def png(figure: Sheet) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    quick: dict[str, Any] = {"compress_level": 3}  # no larger than more effort makes them
    dpi = NARROW_DPI if figure.narrow else "figure"
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None}, pil_kwargs=quick)
    return buffer.getvalue()


def pdf(figure: Sheet) -> bytes:
    """Return the figure as PDF bytes, for papers: its fonts embedded, without what a caption says."""
    buffer = io.BytesIO()
    with figure.without_words(), matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(buffer, format="pdf", metadata=NO_PDF_METADATA, bbox_inches=figure.drawing)
    return buffer.getvalue()


def svg(figure: Sheet, name: str) -> bytes:
    """The figure as SVG bytes. The ids in it hang on `name`, so that many figures can stand in one page.

    Nothing in it reaches out of the drawing: no style sheet, and no ids but those that it refers to itself.
    What a page says around all of its figures is not drawn, only told: where the data come from.
    """
    buffer = io.BytesIO()
    with figure.without_words(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA, bbox_inches=figure.drawing)
    for prefix, space in (("", SVG), ("xlink", XLINK)):
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.fromstring(buffer.getvalue())
    shrink(root)
    root.attrib |= {"role": "img", "aria-label": f"{figure.title} {figure.alt}"}
    source = ElementTree.Element(f"{{{SVG}}}desc")
    source.text = figure.source
    root.insert(0, source)
    root.set("style", f"stroke-linejoin: round; stroke-linecap: butt; font-family: {FACES}")
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def shrink(root: ElementTree.Element) -> None:
    """Take out what draws nothing and what is said twice, and round places to a tenth of a point."""
    _unwrap(root)
    for element in root.iter():
        for key in PLACES:
            if key in element.attrib:
                element.set(key, _compact(element.attrib[key]))
        if element.tag == f"{{{SVG}}}text":
            _shrink_text(element)
        else:
            element.text = None
        element.tail = "\n"
    _share_styles(root)
    referred = {word for e in root.iter() for v in e.attrib.values() for word in re.findall(r"#([\w.-]+)", v)}
    for element in root.iter():
        if element.get("id") not in referred:
            element.attrib.pop("id", None)


def _unwrap(root: ElementTree.Element) -> None:
    """Put what stands in a group that says nothing of it in the group's place."""
    for parent in reversed([*root.iter()]):
        kept: list[ElementTree.Element] = []
        for child in parent:
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                continue
            alone = child.tag == f"{{{SVG}}}g" and not child.attrib.keys() - {"id"}
            kept.extend(child if alone else [child])
        parent[:] = kept


def _shrink_text(element: ElementTree.Element) -> None:
    styles = element.attrib["style"].split("; ")
    element.set("style", "; ".join(part for part in styles if part != FACE))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    element.text = (element.text or "").replace("  ", "\N{NO-BREAK SPACE}" * 2)  # plain ones would become one


def _share_styles(root: ElementTree.Element) -> None:
    """Say once for a run of neighbours what each one's style says, and of a mark what it lacks itself."""
    marks = {
        mark.get("id"): mark.get("style", "") for mark in root.iter(f"{{{SVG}}}path") if "id" in mark.attrib
    }
    for use in root.iter(f"{{{SVG}}}use"):
        own = marks.get(use.attrib[f"{{{XLINK}}}href"][1:], "").split("; ")
        rest = [part for part in use.get("style", "").split("; ") if part not in own]
        use.set("style", "; ".join(rest))
    for parent in [*root.iter()]:
        runs: list[ElementTree.Element] = []
        for style, members in itertools.groupby(list(parent), key=lambda child: child.get("style", "")):
            neighbours = list(members)
            if style and len(neighbours) > 1:
                group = ElementTree.Element(f"{{{SVG}}}g", {"style": style})
                group.extend(neighbours)
                for child in neighbours:
                    del child.attrib["style"]
                neighbours = [group]
            runs.extend(neighbours)
        parent[:] = runs


def _compact(value: str) -> str:
    """Return what says where, each number with one digit after the point, and no space that can go."""
    text = NUMBER.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), " ".join(value.split()))
    return re.sub(r" ?([MLCQzZ]) ?", r"\1", text).replace(" -", "-")
