"""Which heads carry a skill, and are they still its heads after training? `python -m experiments.circuits --help`."""
