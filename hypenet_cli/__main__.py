"""Entry point of the `hypenet` command."""

from hypenet_cli.extras import start


def main() -> None:
    """Run the `hypenet` command."""
    start("hypenet", "model", "hypenet_cli.main")


if __name__ == "__main__":
    main()
