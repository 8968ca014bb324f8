"""The report of an evaluation: its schema, files and page, and several side by side."""
