"""`python -m kdlib`: see `lab.commands`."""

from kdlib.lab.commands import app

if __name__ == "__main__":
    app()
