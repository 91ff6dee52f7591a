"""Speed and memory; each program prints its own table."""
