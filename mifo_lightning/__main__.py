"""`python -m mifo_lightning fit|validate|test --config ...`"""

import sys

from mifo_lightning.stopping import interruption

if __name__ == "__main__":
    interruption.install()  # the imports below take seconds; at the end it stays, for what runs at exit
    with interruption.handled(sys.argv[1:]):
        from mifo_lightning.cli import main

        main()
