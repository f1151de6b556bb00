"""OpenAI's images API. `python serve.py`."""

from hi_diffusers.commands.serve import main

if __name__ == "__main__":
    raise SystemExit(main())
