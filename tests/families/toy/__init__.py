"""A family as small as one can be: it predicts a flat picture whose grey the prompt's length gives."""
