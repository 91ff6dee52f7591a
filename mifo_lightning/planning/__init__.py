"""What a run will need, before there is a GPU: memory by component and tokens per second, from its configuration."""
