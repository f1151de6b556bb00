"""The page of gradio_demo.py: requests are checked on the server, drawn one at a time, and shown."""
