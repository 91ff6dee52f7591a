"""Does RL heal what SFT forgets, and where in the weights? The study of arXiv 2509.12235, with its controls."""
