"""The HiDream transformer."""
