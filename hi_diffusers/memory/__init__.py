"""The memory that a drawing needs, and ways to keep a model in little memory."""
