"""Where weights come from and how they are read: source, hub, headers, quantized formats, identity."""
