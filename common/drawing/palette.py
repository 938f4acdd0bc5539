"""Colours of every picture that the pack draws."""

Colour = tuple[int, int, int]

WIDTH = 768  # px of a plot or a sheet
INK, GREY, FAINT, GRID, PAPER = (40, 40, 46), (110, 110, 118), (205, 205, 212), (232, 232, 237), (252, 252, 253)
BLUE, ORANGE, GREEN = (86, 130, 214), (222, 140, 62), (70, 150, 96)  # series; BLUE is MLLM tokens, ORANGE VAE tokens
PURPLE, RED = (150, 90, 180), (190, 70, 90)
MID = (140, 140, 146)  # between GREY and FAINT
AXES = {"front": (214, 60, 52), "right": (56, 156, 74), "top": (58, 108, 220)}  # of a subject
# Of weights in a heat map: from none to most light yellow, orange, red, near black; below zero blue. Our choice.
HEAT = (PAPER, (253, 220, 140), (244, 140, 62), (190, 50, 70), (60, 15, 60))
COLD = (PAPER, (120, 170, 225), (30, 70, 150))


def faint(colour: Colour, share: float = 0.35) -> Colour:
    """`colour` mixed with the paper; `share` of it stays."""
    r, g, b = (round(share * c + (1 - share) * p) for c, p in zip(colour, PAPER))
    return r, g, b
