"""Entry point of the `halo` command."""

from hypenet_cli.extras import start


def main() -> None:
    """Run the `halo` command."""
    start("halo", "halo", "halo.cli")


if __name__ == "__main__":
    main()
