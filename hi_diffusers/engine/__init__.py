"""Opens and loads a model, and draws with it."""
