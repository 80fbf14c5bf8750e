"""Reports: scored runs -> comparison, ranking, verdict; tables, charts, Markdown, HTML."""
