"""Entry points of the `halo` and `hypenet` commands. Neither imports torch before a command of theirs runs."""

from halo.extras import start


def main() -> None:
    """Run the `halo` command."""
    start("halo", "halo", "halo.cli")


def hypenet() -> None:
    """Run the `hypenet` command."""
    start("hypenet", "model", "halo.hypenet_cli")


if __name__ == "__main__":
    main()
