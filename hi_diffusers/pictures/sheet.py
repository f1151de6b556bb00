"""Several pictures side by side as one, each with a caption under it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 384
FONT_SIZE = 18
MARGIN = 12


def side_by_side(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Put pictures of one size in a row; small ones are enlarged by whole pixels so that captions fit.

    Args:
        pictures: (picture, caption) pairs, at least one; a caption may have several lines.
    """
    width, height = pictures[0][0].size
    factor = max(1, -(-MIN_SIDE // width))
    font = ImageFont.load_default(FONT_SIZE)
    num_lines = max(caption.count("\n") + 1 for _, caption in pictures)
    band = num_lines * (FONT_SIZE + 6) + MARGIN
    cell = width * factor + MARGIN
    sheet = Image.new("RGB", (cell * len(pictures) + MARGIN, height * factor + MARGIN + band), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(pictures):
        left = MARGIN + index * cell
        sheet.paste(picture.resize((width * factor, height * factor), Image.Resampling.NEAREST), (left, MARGIN))
        draw.multiline_text((left, MARGIN + height * factor + 4), caption, fill="black", font=font)
    return sheet
