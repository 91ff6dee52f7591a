"""Programs that answer a question or remake an artefact; each module's docstring begins with which."""
