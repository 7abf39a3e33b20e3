"""The whole comparison: every method, its controls, the table and the report."""
