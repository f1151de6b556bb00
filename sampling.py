"""A prompt file, a folder of pictures: `python sampling.py --prompt_file prompts.txt --output_dir out`."""

from hi_diffusers.commands.sampling import main

if __name__ == "__main__":
    raise SystemExit(main())
