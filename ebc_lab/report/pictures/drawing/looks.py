"""One look for each arm throughout a study: its colour, marker and line in every picture, and on the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ebc_lab.study.stages.stage import decision_that_shows

from ...text.words import mine_of

# Okabe and Ito's, safe for colour-blind readers: the page's classes c0 to c7, and the style's C0 to C7
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#000000")
EBC, ALERT, GOAL, PINK, AMBER, SKY, PLAIN, BLACK = PALETTE
MARKERS = "o^DvPXs*"
DASHES = ("-", "--", "-.", ":")
GREY_PLACE = PALETTE.index(PLAIN)  # of what the others are compared with
INK, GREY = "#333333", "#666666"
RULE = "#999999"  # of lines that only guide the eye
REST = "#BBBBBB"  # of lines that are not told apart
SMALL = 9.0  # points of the words in a picture
SEED: dict[str, Any] = {"ls": "", "marker": "o", "ms": 3.2, "mew": 0, "alpha": 0.45}  # a single seed's point
FAINT: dict[str, Any] = {"lw": 0.5, "alpha": 0.6}  # a single seed's line, in a key
# around what was chosen, in a colour that no arm has
RING: dict[str, Any] = {"marker": "o", "color": INK, "ms": 13, "mfc": "none", "mew": 1.6, "ls": ""}


class Look(NamedTuple):
    """How an arm is drawn. `place`: in the palette, from which the page takes its own shade."""

    place: int
    line: str = "-"

    @property
    def colour(self) -> str:
        return PALETTE[self.place % len(PALETTE)]

    @property
    def marker(self) -> str:
        times = self.place // len(PALETTE)  # the second time round a colour has another marker
        return MARKERS[(self.place + times) % len(MARKERS)]


UNKNOWN = Look(PALETTE.index(BLACK), ":")


def assign_looks(
    names: Iterable[str], strong: Iterable[str] = (), plain: str | None = None
) -> dict[str, Look]:
    """Return a look for each name: the first colours for the `strong`, grey for `plain`."""
    every = list(dict.fromkeys(names))
    first = [name for name in dict.fromkeys(strong) if name in every and name != plain]
    order = [*first, *(name for name in every if name not in first and name != plain)]
    places = (i for i in range(len(every) * len(PALETTE)) if i != GREY_PLACE)
    looks = {
        name: Look(place, DASHES[nth % len(DASHES)])
        for nth, (name, place) in enumerate(zip(order, places, strict=False))
    }
    return looks | ({plain: Look(GREY_PLACE, "--")} if plain in every else {})


def study_looks(decisions: Mapping[str, Any]) -> dict[str, Look]:
    """Return the look of each arm that a study compares, by name; a sweep's points have that of the sweep."""
    looks: dict[str, Look] = {}
    for kind in ("arms", "verdict"):
        compared = decision_that_shows(kind, decisions)
        for track in (compared or {"tracks": {}})["tracks"].values():
            arms = track["arms"]
            sweep_of = {
                point["arm"]: name
                for name, sweeps in track.get("windows", {}).items()
                for sweep in sweeps.values()
                for point in sweep["points"]
            }
            strong = mine_of(track) or [sweep_of.get(name, name) for name, arm in arms.items() if arm["ebc"]]
            plain = track["reference"] if kind == "arms" else track["roles"]["baseline"]
            names = [sweep_of.get(name, name) for name in arms]
            own = assign_looks(names, strong, sweep_of.get(plain, plain))
            looks |= own | {name: own[sweep] for name, sweep in sweep_of.items()}
    return looks
