"""One prompt, one picture: `python inference.py "a small red star on a blue background"`."""

from hi_diffusers.commands.inference import main

if __name__ == "__main__":
    raise SystemExit(main())
