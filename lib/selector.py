"""Mark the pictures that have a feature (FU, Fig. 2): live in Jupyter, and static in the book.

In Jupyter the marks are at hand in the next cell. In the book, where no kernel runs, the reader
saves them as JSON, which :func:`read_selection` reads. Pictures are numbered from 0 everywhere.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from html import escape
from pathlib import Path

import numpy as np
import torch

from lib import ROOT
from lib.checkpoints import write_atomically
from lib.explorer import MAX_BYTES, in_live_frontend
from lib.explorer_draw import sprite
from lib.methods.selection import Marks, marks_of

FORMAT = "marked pictures, version 1"
KEYS = {"format", "feature", "pictures", "fingerprint", "marked"}


class SelectionError(ValueError):
    """Say in one sentence what is wrong with a file of marks and what to do."""


class Selector:
    """Show pictures in a grid and let the reader mark those with a feature.

    ``images`` are uint8 (n, height, width, 1 or 3). ``feature`` completes the sentence "Mark every
    picture with ...". ``marked`` are the numbers of those marked at the start. ``title`` and
    ``caption`` are plain text above and below; ``per_page`` is for Jupyter alone.

    Raises: ValueError, in one sentence, for other images, a number that no picture has, or more
    than 1.5 MB.
    """

    def __init__(
        self,
        images: np.ndarray,
        feature: str,
        marked: Iterable[int] = (),
        title: str = "",
        caption: str = "",
        per_page: int = 60,
    ):
        self.images = np.asarray(images)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or not len(self.images):
            raise ValueError(
                f"The pictures are {self.images.dtype} of shape {self.images.shape}, wanted uint8 "
                "of shape (n, height, width, channels); convert them."
            )
        if self.images.shape[-1] not in (1, 3):
            raise ValueError(
                f"The pictures have {self.images.shape[-1]} channels, wanted 1 or 3; put the "
                "channels last."
            )
        self.feature, self.title, self.caption = feature, title or "Pictures to mark", caption
        self.per_page = per_page
        self.marked = {int(number) for number in marked}
        if strangers := sorted(self.marked - set(range(len(self.images)))):
            raise ValueError(
                f"Picture {strangers[0]} is to be marked, but they are numbered from 0 to "
                f"{len(self.images) - 1}."
            )
        size = len(self.html.encode())
        if size > MAX_BYTES:
            raise ValueError(
                f"The {len(self.images)} pictures take {size / 1e6:.2f} MB, wanted at most "
                f"{MAX_BYTES / 1e6:.1f} MB; show fewer or smaller ones."
            )

    @property
    def marks(self) -> Marks:
        """Return the numbers of the marked and of the other pictures, for ``marks.split(z)``."""
        return marks_of(self._pressed())

    def _pressed(self) -> torch.Tensor:
        return torch.tensor([number in self.marked for number in range(len(self.images))])

    def fingerprint(self) -> str:
        """Return eight letters that change with any pixel, the order or the feature."""
        digest = hashlib.sha256(f"{self.feature} {self.images.shape}".encode())
        digest.update(self.images.tobytes())
        # Letters only: the notebook tests compare digits as numbers, with a tolerance.
        return digest.hexdigest()[:8].translate(str.maketrans("0123456789", "ghijklmnop"))

    def save(self, path: Path | str) -> None:
        """Write the marks as JSON, as the button of the page does."""
        content = {
            "format": FORMAT,
            "feature": self.feature,
            "pictures": len(self.images),
            "fingerprint": self.fingerprint(),
            "marked": sorted(self.marked),
        }
        write_atomically(Path(path), json.dumps(content, ensure_ascii=False).encode())

    def __repr__(self) -> str:
        n, height, width, channels = self.images.shape
        return (
            f"Selector of {n} pictures {height}×{width}×{channels} for '{self.feature}', "
            f"{len(self.marked)} marked\n  fingerprint {self.fingerprint()}"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        bundle = {"text/plain": repr(self), "text/html": self.html}
        if in_live_frontend():
            key = "application/vnd.jupyter.widget-view+json"
            bundle |= {key: self.widget()._repr_mimebundle_()[key]}
        return bundle

    @cached_property
    def _sources(self) -> list[str]:
        return [sprite(image) for image in self.images]

    @cached_property
    def html(self) -> str:
        """The static element, with the marks of the start; its script does the rest."""
        height, width = self.images.shape[1:3]
        pictures = "".join(
            f'<button type="button" class="sel-picture" aria-label="picture {number}" '
            f'aria-pressed="{str(number in self.marked).lower()}">'
            f'<img src="{source}" alt="" width="{width}" height="{height}"></button>'
            for number, source in enumerate(self._sources)
        )
        caption = f'<p class="ex-caption">{escape(self.caption)}</p>' if self.caption else ""
        return (
            f'<book-selector class="ex sel" role="group" aria-label="{escape(self.title)}" '
            f'data-format="{FORMAT}" data-feature="{escape(self.feature)}" '
            f'data-fingerprint="{self.fingerprint()}"><p class="ex-title">{escape(self.title)}</p>'
            f'<p class="sel-how">Mark every picture with <strong>{escape(self.feature)}</strong>: '
            "click it, or go there with the arrow keys and press space.</p>"
            '<p class="ex-still">Marking needs JavaScript.</p>'
            f'<div class="sel-grid" role="group" aria-label="pictures">{pictures}</div>'
            f'<p class="sel-count" role="status">{self.count()}</p>'
            '<div class="sel-actions"><button type="button" class="sel-save">Save as JSON</button>'
            '<button type="button" class="sel-copy">Copy</button>'
            '<button type="button" class="sel-clear">Clear</button>'
            '<span class="sel-note" role="status"></span></div>'
            '<details class="sel-json"><summary>JSON</summary><pre tabindex="0"></pre></details>'
            f"{caption}</book-selector>"
        )

    def count(self) -> str:
        """Say how many pictures are marked."""
        return f"{len(self.marked)} of {len(self.images)} marked"

    def widget(self):
        """Return the live ipywidgets view; see :class:`LiveGrid`."""
        return LiveGrid(self).view


class LiveGrid:
    """The pictures of a Selector as toggle buttons of ipywidgets, which change its ``marked``.

    Such a button shows words only, so a style sheet puts the picture on it; Tab goes from one to
    the next and Space marks. Hundreds of widgets would be slow, so there is one page of buttons,
    which show other pictures on the next page.
    """

    def __init__(self, selector: Selector):
        import ipywidgets

        self.selector, self.page = selector, 0
        n = len(selector.images)
        self.firsts = range(0, n, selector.per_page)
        self.sheet, self.count = ipywidgets.HTML(), ipywidgets.HTML()
        self.buttons = [ipywidgets.ToggleButton() for _ in range(min(selector.per_page, n))]
        for place, button in enumerate(self.buttons):
            button.add_class("sel-live-picture").add_class(f"sel-{place}")
            button.observe(lambda change, place=place: self.click(place, change["new"]), "value")
        self.clear, self.back, self.on = (
            ipywidgets.Button(description=word) for word in ("Clear", "Previous page", "Next page")
        )
        self.clear.on_click(lambda _: self.unmark())
        self.back.on_click(lambda _: self.turn(-1))
        self.on.on_click(lambda _: self.turn(1))
        how = ipywidgets.HTML(
            f'<p class="ex-title">{escape(selector.title)}</p><p class="sel-how">Mark every '
            f"picture with <strong>{escape(selector.feature)}</strong>: click it, or go there with "
            "Tab and press space.</p>"
        )
        caption = ipywidgets.HTML(f'<p class="ex-caption">{escape(selector.caption)}</p>')
        grid = ipywidgets.Box(self.buttons).add_class("sel-grid")
        shown = [self.clear, self.back, self.on] if len(self.firsts) > 1 else [self.clear]
        actions = ipywidgets.HBox(shown).add_class("sel-actions")
        self.view = ipywidgets.VBox([self.sheet, how, grid, self.count, actions, caption])
        # Two selectors of one notebook must not share a style.
        self.scope = f"sel-{self.view.model_id}"
        self.view.add_class("ex").add_class("sel").add_class(self.scope)
        self.turn(0)

    def turn(self, by: int) -> None:
        """Go some pages on, and put the pictures and marks of the new one onto the buttons."""
        self.page = min(max(self.page + by, 0), len(self.firsts) - 1)
        self.back.disabled = self.page == 0
        self.on.disabled = self.page == len(self.firsts) - 1
        first, pictures = self.firsts[self.page], ""
        for place, button in enumerate(self.buttons):
            number = first + place
            is_there = number < len(self.selector.images)
            button.layout.display = None if is_there else "none"
            if is_there:
                button.value = number in self.selector.marked
                self.name(place)
                source = self.selector._sources[number]
                # As many classes as the style that makes a plain button of it, and one more.
                chosen = f".ex.{self.scope} .jupyter-button.sel-{place}"
                pictures += f"{chosen}{{background-image:url({source})}}"
        files = ("explorer.css", "selector.css")
        style = "".join((ROOT / "book/_static" / name).read_text("utf8") for name in files)
        self.sheet.value = f"<style>{style}{pictures}</style>"
        self.say()

    def click(self, place: int, pressed: bool) -> None:
        """Note a mark; turning a page sets the buttons to the marks there are, and changes none."""
        number = self.firsts[self.page] + place
        (self.selector.marked.add if pressed else self.selector.marked.discard)(number)
        self.name(place)
        self.say()

    def name(self, place: int) -> None:
        """Give a button the words that a screen reader says; ipywidgets sets no aria-pressed."""
        number = self.firsts[self.page] + place
        marked = ", marked" if number in self.selector.marked else ""
        self.buttons[place].description = f"picture {number}{marked}"
        self.buttons[place].tooltip = f"picture {number}"

    def unmark(self) -> None:
        """Take back all marks, on every page."""
        self.selector.marked.clear()
        self.turn(0)

    def say(self) -> None:
        pages = len(self.firsts)
        where = f", page {self.page + 1} of {pages}" if pages > 1 else ""
        self.count.value = f'<p class="sel-count" role="status">{self.selector.count()}{where}</p>'


def read_selection(path: Path | str, selector: Selector | None = None) -> Marks:
    """Read marks that were saved from the page or by :meth:`Selector.save`.

    ``selector`` is the one that shows the pictures; with it, marks of other pictures are refused.

    Raises: SelectionError if the file is not there, is something else, or belongs to other
    pictures.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text("utf8"))
    except OSError as error:
        raise SelectionError(f"{path} cannot be read ({error.strerror}); save it again.") from error
    except ValueError as error:
        raise SelectionError(f"{path} is not JSON; save it again from the page.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.keys() != KEYS:
        raise SelectionError(f"{path} holds no marks; save it from the page or by Selector.save.")
    n, marked = content["pictures"], content["marked"]
    if not _is_whole(n) or n < 1:
        raise SelectionError(f"{path} tells of {n!r} pictures, wanted a whole number of them.")
    if not isinstance(marked, list) or not all(_is_whole(m) and 0 <= m < n for m in marked):
        raise SelectionError(f"{path} marks {marked!r}, wanted numbers from 0 to {n - 1}.")
    if len(set(marked)) != len(marked):
        raise SelectionError(f"{path} marks a picture twice; save it again from the page.")
    if selector and content["fingerprint"] != selector.fingerprint():
        raise SelectionError(
            f"{path} is about other pictures or another feature ({n} pictures, "
            f"{content['feature']!r}) than those shown ({len(selector.images)}, "
            f"{selector.feature!r}); mark these, or show those."
        )
    return marks_of(torch.isin(torch.arange(n), torch.tensor(marked, dtype=torch.long)))


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
