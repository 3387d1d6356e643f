"""`python -m kdlib` runs the command line."""

from kdlib.ship.commands import app

if __name__ == "__main__":
    app()
