"""The whole command line. Each module adds its commands to one app, in the order in which --help lists them."""

from evalkit import cli, cli_bench, cli_cache, cli_distill, cli_import, cli_quantise, cli_reports, cli_sweep

__all__ = [
    "app",
    "cli_bench",
    "cli_cache",
    "cli_distill",
    "cli_import",
    "cli_quantise",
    "cli_reports",
    "cli_sweep",
]

app = cli.app
