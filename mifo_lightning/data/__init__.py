"""Data: `rows` are read and checked, `questions` are built from them, `datamodule` serves them."""
