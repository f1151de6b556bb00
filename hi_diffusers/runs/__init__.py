"""A run: a prompt file drawn into a folder, in units that can be done anywhere and again."""
