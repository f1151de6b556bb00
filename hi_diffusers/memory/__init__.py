"""What a drawing needs of memory, and how it is kept where there is little of it."""
