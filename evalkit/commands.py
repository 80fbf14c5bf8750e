"""The whole command line. Each module adds its commands to one app, in the order in which --help lists them."""

from evalkit import cli, cli_bench, cli_distill, cli_quantise, cli_reports

__all__ = ["app", "cli_bench", "cli_distill", "cli_quantise", "cli_reports"]

app = cli.app
