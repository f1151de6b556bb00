"""Pictures: their files, metadata, figures and filter."""
