"""Does it hold? Faults, kills, hostile input and long runs, each tool a table; `make stress` runs them all."""
