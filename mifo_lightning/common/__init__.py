"""What every room stands on: errors, the terminal, files, the hub, keys of random choices, questions."""
