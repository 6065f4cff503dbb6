"""The splitter: rules (the mapping table) -> plan (pure) -> formats and copying (I/O)."""
