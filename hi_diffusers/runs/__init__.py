"""A run: a prompt file drawn into a folder, in units that any machine can draw, and draw again."""
