"""`python -m mifo_lightning fit|validate|test --config ...`"""

from mifo_lightning.cli import program

if __name__ == "__main__":
    program()
