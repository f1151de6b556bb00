"""The page of gradio_demo.py: requests are checked on the server and drawn one at a time."""
