"""Serving many clients: an engine that draws for them, and OpenAI's images API before it."""
