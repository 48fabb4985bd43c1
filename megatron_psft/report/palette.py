"""Colours of all pictures, in reports and examples: Okabe and Ito's, which colour-blind readers tell apart too.

Their yellow is left out: it is too pale for lines.
"""

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
BLACK, SKY, ORANGE, GREY = "#000000", "#56B4E9", "#E69F00", "#888888"

PSFT, SFT = BLUE, VERMILION

RUNS = (BLUE, VERMILION, GREEN, PURPLE, BLACK, SKY, ORANGE)
"""Of the runs of a report; `drawing.styles_of` gives PSFT and SFT their own."""
