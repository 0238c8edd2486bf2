"""The colours of lines on a page: drawn ones, and what stands for them in light and dark mode."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PageColor:
    """A colour that matplotlib draws, and the page's property that replaces it."""

    drawn: str
    name: str
    light: str
    dark: str

    @property
    def value(self) -> str:
        """The value in CSS."""
        return f"var({self.name})"


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111")
"""the colour-blind-safe palette of Okabe and Ito; black becomes the page's text colour"""
TRUNK = "#777777"
"""what runs have in common"""
PAGE = (
    PageColor("#0072b2", "--blue", "#0072b2", "#5aa9e6"),
    PageColor("#d55e00", "--orange", "#cf5a00", "#ff9257"),
    PageColor("#009e73", "--green", "#00936b", "#3fcf9f"),
    PageColor("#cc79a7", "--pink", "#b8568c", "#e79cc6"),
    PageColor("#e69f00", "--yellow", "#b37b00", "#f2b84b"),
    PageColor("#56b4e9", "--sky", "#3490c8", "#a5e3ff"),
    PageColor(TRUNK, "--trunk", "#777777", "#9aa4ae"),
)
"""in dark mode all have a contrast of at least 4.5 to the card, in light mode of 3"""
PAGE_COLORS = {
    **dict.fromkeys(("#000000", "#111111", "#555555"), "currentColor"),
    "#ffffff": "var(--card)",
    **{color.drawn: color.value for color in PAGE},
}
"""by drawn colour, what stands for it on the page"""
