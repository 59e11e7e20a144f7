"""Print what `report.json` is made of: `python -m bakeout.validate.report --help`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json-schema", is_flag=True, help="As a JSON Schema (draft 2020-12) instead of Markdown.")
def main(json_schema: bool) -> None:
    """Print the fields of `report.json`, as they stand in docs/report.md."""
    from bakeout.validate.report.fields import to_markdown
    from bakeout.validate.report.schema import Report

    click.echo(json.dumps(Report.model_json_schema(), indent=2) if json_schema else to_markdown(), nl=json_schema)


if __name__ == "__main__":
    main()
