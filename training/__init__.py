"""The recipe of the bundled model: its world, its three trainings, and how well it draws."""

import logging

# diffusers loads bitsandbytes, which says at once that a kernel of its own is missing; nothing here is quantized.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
