"""What a user asks for, checked and decided."""
