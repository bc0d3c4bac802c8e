"""Jobs that save in one layout and go on in another: every state bit for bit, every loss as if never interrupted."""
