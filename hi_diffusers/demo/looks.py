"""Colours and fonts of the page: gradio's base theme with the system's fonts, so that no font is downloaded."""

import gradio as gr


def theme() -> gr.themes.Base:
    """The page's theme, for light and dark."""
    made = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return made.set(
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
    )
