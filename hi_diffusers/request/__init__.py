"""A user's request, checked and decided."""
