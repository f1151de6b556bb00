"""One wing for each family of models."""
