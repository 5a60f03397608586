"""A figure as files: PNG, and SVG small enough to embed; the same bytes at every call.

Text stays text in the SVG (`svg.fonttype: none`): it can be selected, searched and read out, and takes a
fifth of the bytes that outlines take. Its layout was measured in DejaVu Sans, about the widest face there is,
so that a reader's own sans-serif leaves a little air instead of running into something.
"""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib

from .drawing.sheet import Sheet

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FACES = "'DejaVu Sans', Verdana, Arial, sans-serif"  # the style's, and what stands in for it
NUMBER = re.compile(r"-?\d+\.\d+")
PLACES = ("d", "x", "y", "transform", "width", "height")  # attributes that say where
LONG = 400  # characters of a path: a curve of this many points needs no hundredth of a point
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
    """Take out what draws nothing, say once what many marks say, and round places: to a hundredth of a point
    at most."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    everything = list(root.iter())
    referred = {
        word for e in everything for v in e.attrib.values() for word in re.findall(r"(?<=#)[\w.-]+", v)
    }
    for element in everything:
        attributes = element.attrib
        if attributes.get("id") not in referred:
            attributes.pop("id", None)
        for key in PLACES:
            if key in attributes:
                attributes[key] = rounded(attributes[key], 1 if len(attributes[key]) > LONG else 2)
        if element.tag == f"{{{SVG}}}text":
            attributes["style"] = (
                attributes["style"]
                .replace("font-family: 'DejaVu Sans'; ", "")
                .replace("; font-family: 'DejaVu Sans'", "")
            )
            if attributes.get("transform", "").startswith("rotate(-0 "):
                del attributes["transform"]
            element.text = (element.text or "").replace(
                "  ", "\N{NO-BREAK SPACE}" * 2
            )  # plain ones would become one
        else:
            element.text = None
        element.tail = "\n"
        marks = [child.get("style") for child in element if child.tag == f"{{{SVG}}}use"]
        if len(marks) == len(element) > 1 and len(set(marks)) == 1 and marks[0]:
            element.set("style", marks[0])
            for child in element:
                del child.attrib["style"]


def rounded(value: str, digits: int) -> str:
    """Every number in an attribute, rounded to `digits` digits after the point."""
    return NUMBER.sub(
        lambda match: f"{float(match[0]):.{digits}f}".rstrip("0").rstrip("."), " ".join(value.split())
    )
