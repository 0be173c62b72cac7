"""Vision-language models as judges of realism: the paper's three questions, in this process or by a server."""
