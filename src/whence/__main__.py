"""`python -m whence`: the command line."""

from whence.cli.main import run

if __name__ == "__main__":
    run()
