"""The language model: loading it, scoring with it, decoding with it."""
