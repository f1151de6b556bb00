"""Calibrate the cache for a model and sampler: `python calibrate.py --model_type nano`."""

from hi_diffusers.commands.calibrate import main

if __name__ == "__main__":
    raise SystemExit(main())
