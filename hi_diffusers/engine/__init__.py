"""A model that is opened, loaded and drawn with."""
