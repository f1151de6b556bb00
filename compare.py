"""Two runs of sampling.py, picture by picture: `python compare.py uncached cached`."""

from hi_diffusers.commands.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
