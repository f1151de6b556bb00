"""The page: draw, watch it being drawn, compare cached with uncached. `python gradio_demo.py`."""

from hi_diffusers.commands.gradio_demo import main

if __name__ == "__main__":
    raise SystemExit(main())
